"""How a layer's state lies in the records of a folder: what is in pages, what behind.

Owns the names and shapes of arrays; keys, and what is read and written, are
`saved_texts`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..conversations.records import dtype_name


def layout_of(cache: Any, state: dict[str, Any]) -> list[list[Any]]:
    """[name, dtype, heads, rows of a page, width] of arrays that are in pages."""
    layout: list[list[Any]] = []
    for name in sorted(state):
        if name.startswith(("packed:", "means:")):
            array = state[name]
            _, heads, rows, width = array.shape
            of_page = (
                1
                if name.startswith("means:")
                else cache.spec.page * rows // cache.packed_length
            )
            layout.append([name, dtype_name(array), heads, of_page, width])
    return layout


def shapes_of(state: dict[str, Any], group: str) -> list[list[Any]]:
    """[name, dtype, heads, width] of a group's arrays."""
    return [
        [name, dtype_name(array), array.shape[1], array.shape[3]]
        for name, array in state.items()
        if name.startswith(group)
    ]


def nothing_of(shapes: Sequence[Sequence[Any]]) -> dict[str, mx.array]:
    """Arrays of no tokens, as `shapes_of` says."""
    return {
        name: mx.zeros((1, heads, 0, width), getattr(mx, dtype))
        for name, dtype, heads, width in shapes
    }

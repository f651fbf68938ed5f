"""Where a page's bytes are among a cache's arrays.

Owns which arrays of `TurboQuantCache.state` are in pages, and how many rows of each a
page has. What is done with the bytes is ``saved_texts.py``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..conversations.records import dtype_name


def page_layout(cache: Any, state: dict[str, Any]) -> list[list[Any]]:
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


def page_nbytes(cache: Any, state: dict[str, Any]) -> int:
    """Bytes that a page takes in one layer."""
    return sum(
        heads * rows * width * int(getattr(mx, dtype).size)
        for _, dtype, heads, rows, width in page_layout(cache, state)
    )


def shape_of(state: dict[str, Any], group: str) -> list[list[Any]]:
    """[name, dtype, heads, width] of a group's arrays."""
    return [
        [name, dtype_name(array), array.shape[1], array.shape[3]]
        for name, array in state.items()
        if name.startswith(group)
    ]


def nothing(shapes: Sequence[Sequence[Any]]) -> dict[str, mx.array]:
    """Arrays of no tokens, as `shape_of` says."""
    return {
        name: mx.zeros((1, heads, 0, width), getattr(mx, dtype))
        for name, dtype, heads, width in shapes
    }

"""Trees of arrays and values as bytes, for files.

Owns the form of a record: its manifest as JSON, then the arrays' bytes. What the arrays
mean is its callers'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

Bytes = npt.NDArray[np.uint8]
_LENGTH = 8


def bytes_of(array: mx.array) -> Bytes:
    """An array's bytes, in the order of its elements."""
    if not array.size:
        return np.zeros(0, np.uint8)
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))


def array_of(data: Bytes, dtype: str, shape: Sequence[int]) -> mx.array:
    """The inverse of `bytes_of`.

    Args:
        data: The bytes.
        dtype: The name of an MLX dtype: ``"bfloat16"``.
        shape: The array's.
    """
    kind = getattr(mx, dtype)
    if not data.size:
        return mx.zeros(tuple(shape), kind)
    return mx.array(data).view(kind).reshape(tuple(shape))


def dtype_name(array: mx.array) -> str:
    """As `array_of` takes it."""
    return str(array.dtype).rpartition(".")[2]


def pack(tree: Any) -> list[memoryview]:
    """A tree of arrays, numbers, texts and None as buffers to write in turn."""
    manifest, buffers, at = [], [], 0
    flat: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]
    for name, leaf in flat:
        if not isinstance(leaf, mx.array):
            manifest.append([name, leaf])
            continue
        data = bytes_of(leaf)
        manifest.append([name, dtype_name(leaf), list(leaf.shape), at, data.size])
        buffers.append(data.data)
        at += data.size
    head = json.dumps(manifest).encode()
    length = len(head).to_bytes(_LENGTH, "little")
    return [memoryview(length + head), *buffers]


def unpack(data: Bytes) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    length = int.from_bytes(data[:_LENGTH].tobytes(), "little")
    start = _LENGTH + length
    leaves = []
    for name, *rest in json.loads(data[_LENGTH:start].tobytes()):
        if len(rest) == 1:
            leaves.append((name, rest[0]))
        else:
            dtype, shape, at, size = rest
            part = data[start + at : start + at + size]
            leaves.append((name, array_of(part, dtype, shape)))
    return tree_unflatten(leaves)

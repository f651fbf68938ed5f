"""`PackedCodes`: what a codec writes, as named arrays that share one token axis.

Owns the convention that tokens are axis -2 of every array, (B, H, T, .), and that
arrays may have more capacity than ``length``. Knows nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class PackedCodes:
    """Encoded vectors of one side of one layer.

    Attributes:
        arrays: Name to array (B, H, capacity, .), whole buffers, never slices, so
            that a kernel can take them without a copy.
        length: Tokens in use, counted from the front.
    """

    arrays: Mapping[str, mx.array]
    length: int

    def view(self, name: str, heads: slice = slice(None)) -> mx.array:
        """The used tokens of one array: (B, heads, length, .)."""
        return self.arrays[name][:, heads, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffers, capacity included."""
        return sum(array.nbytes for array in self.arrays.values())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.arrays.items())
        return f"PackedCodes({self.length} tokens: {shapes}; {self.nbytes} bytes)"

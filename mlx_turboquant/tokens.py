"""`TokenArrays`: named arrays that share one token axis and a length.

Owns capacity, length and the in-place write. Tokens are axis 2 of every array,
(B, H, capacity, .), or tiles of tokens for codes in tile order (`tiles`). What the
arrays mean is their owner's: codes and scales of a codec, recent keys and values, means
of pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .tiles import TileLayout

#: Rows of buffers, int32.
Places = npt.NDArray[np.int32]

#: Tokens of a tile, which a simdgroup takes at once: ``TILE_TOKENS`` of tiles.h.
TILE = 32
#: A buffer's spare rows are fewer than one in so many.
_SPARE = 32


def capacity_of(rows: int, growth: int) -> int:
    """Rows of a buffer that has room for ``rows``, of at least one growth.

    It grows by ``growth`` rows, or by 1/32 of what it has, as a power of two,
    whichever is more. So a long text copies it seldom, in few different sizes, which
    are few different blocks for MLX's allocator to keep, and under 1/32 is spare.

    >>> [capacity_of(rows, 4) for rows in (1, 5, 127, 129, 260, 2001)]
    [4, 8, 128, 132, 264, 2016]
    """
    step = max(growth, 1 << max(0, (rows // _SPARE).bit_length() - 1))
    return max(1, -(-rows // step)) * step


class Codes(Protocol):
    """Codes to read: `TokenArrays`, or a sequence's pages of a pool.

    Attributes:
        length: Tokens.
        layout: Of codes in tile order, or None.
    """

    length: int
    layout: TileLayout | None

    @property
    def arrays(self) -> Mapping[str, mx.array]:
        """Whole buffers (B, H, capacity, .) by name."""
        ...

    @property
    def tiles(self) -> Places:
        """Row of the buffers that each tile of the text is in, in tile order."""
        ...

    def view(self, name: str, heads: slice = slice(None)) -> mx.array:
        """The rows in use of one array: (B, heads, tokens or tiles, .)."""
        ...

    def views(self) -> dict[str, mx.array]:
        """`view` of every array."""
        ...


class TokenArrays:
    """Arrays (B, H, capacity, .) with one length, counted from the front.

    Growing copies the buffers, to a capacity of their class (`capacity_of`).

    Args:
        arrays: Name to array, taken as they are: all of their tokens are in use unless
            ``length`` says less.
        length: Tokens in use.
        growth: Capacity is a multiple of this many tokens, from the first growth on.
        first: Capacity before that, while it is enough: a text may be short.
        layout: Of codes in tile order, whose rows are tiles; None for a row per token.

    Attributes:
        arrays: Whole buffers, never slices, so that a kernel can take them without a
            copy. A new dict whenever a buffer is new.
    """

    __slots__ = ("arrays", "first", "growth", "layout", "length")

    def __init__(
        self,
        arrays: Mapping[str, mx.array] | None = None,
        length: int | None = None,
        growth: int = 1,
        layout: TileLayout | None = None,
        first: int = 0,
    ) -> None:
        self.arrays: dict[str, mx.array] = dict(arrays or {})
        self.growth, self.first, self.layout = growth, first, layout
        if length is None:
            rows = next((a.shape[2] for a in self.arrays.values()), 0)
            length = rows * self._row_tokens
        self.length = length

    @property
    def _row_tokens(self) -> int:
        """Tokens of a row of axis 2."""
        return 1 if self.layout is None else TILE

    @property
    def tiles(self) -> Places:
        """Rows that tiles are in, in tile order: one behind the other."""
        return np.arange(-(-self.length // TILE), dtype=np.int32)

    def append(self, new: Mapping[str, mx.array], spare: bool = True) -> None:
        """Write tokens (B, H, N, .) of every array behind the present ones.

        Not of codes in tile order, which pages hold (`page_table`).

        Args:
            new: The tokens.
            spare: Whether a buffer that grows gets room for those that follow.
        """
        count = next((a.shape[2] for a in new.values()), 0)
        start, stop = self.length, self.length + count
        # Never few rows: kernels do not take arrays of under 8 elements.
        capacity = capacity_of(stop, self.growth) if spare else stop
        if spare and stop <= self.first:
            capacity = self.first
        for name, rows in new.items():
            buffer = self.arrays.get(name)
            if buffer is None or stop > buffer.shape[2]:
                grown = self._grown(name, rows, capacity)
                self.arrays = {**self.arrays, name: grown}
            else:
                buffer[:, :, start:stop] = rows
        self.length = stop

    def _grown(self, name: str, new: mx.array, capacity: int) -> mx.array:
        """A buffer of so many rows with those in use and new ones."""
        if self.length:
            used = self.view(name)
            new = mx.concatenate([used, new.astype(used.dtype)], axis=2)
        spare = capacity - new.shape[2]
        if not spare:
            return new if self.length else mx.contiguous(new)
        # Zeros: what lies behind the last token must not be NaN.
        return mx.pad(new, [(0, 0), (0, 0), (0, spare), (0, 0)])

    def view(self, name: str, heads: slice = slice(None)) -> mx.array:
        """The rows in use of one array: (B, heads, tokens or tiles, .)."""
        return self.arrays[name][:, heads, : -(-self.length // self._row_tokens)]

    def views(self) -> dict[str, mx.array]:
        """`view` of every array."""
        return {name: self.view(name) for name in self.arrays}

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens; the buffers stay."""
        self.length -= count

    def drop_first(self, count: int, room: int = 0) -> None:
        """Forget the first ``count`` tokens; what is left moves to new buffers.

        Args:
            count: Tokens to forget.
            room: Capacity of those, if that is enough.
        """
        left = {name: a[:, :, count:] for name, a in self.views().items()}
        self.replace(left, room)

    def fork(self) -> TokenArrays:
        """The same arrays, until one of the two is written to."""
        arrays = {name: a.reshape(a.shape) for name, a in self.arrays.items()}
        return TokenArrays(arrays, self.length, self.growth, self.layout, self.first)

    def replace(self, tokens: Mapping[str, mx.array], room: int = 0) -> None:
        """Start over in new buffers holding just ``tokens``, which may be empty.

        With capacity for ``room``, if that is enough.
        """
        self.arrays, self.length, self.first = {}, 0, room
        self.append(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffers, capacity included."""
        return sum(array.nbytes for array in self.arrays.values())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.arrays.items())
        return f"TokenArrays({self.length} tokens: {shapes}; {self.nbytes} bytes)"

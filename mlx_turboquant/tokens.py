"""`TokenArrays`: named arrays that share one token axis and a length.

Owns capacity, length and the in-place write. Tokens are axis 2 of every array,
(B, H, capacity, .). What the arrays mean is their owner's: codes and scales of a codec,
recent keys and values, means of pages.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx


class TokenArrays:
    """Arrays (B, H, capacity, .) with one length, counted from the front.

    Growing by a fixed number of tokens copies the buffers once per ``growth`` tokens:
    at 128 that is 1.6% of what attention reads in the same time, and it never leaves
    half a buffer unused, as doubling does.

    Args:
        arrays: Name to array, taken as they are: all of their tokens are in use unless
            ``length`` says less.
        length: Tokens in use.
        growth: Capacity is a multiple of this many tokens from the first growth on.

    Attributes:
        arrays: Whole buffers, never slices, so that a kernel can take them without a
            copy. A new dict whenever a buffer is new.
    """

    __slots__ = ("arrays", "growth", "length")

    def __init__(
        self,
        arrays: Mapping[str, mx.array] | None = None,
        length: int | None = None,
        growth: int = 1,
    ) -> None:
        self.arrays: dict[str, mx.array] = dict(arrays or {})
        self.growth = growth
        if length is None:
            length = next((a.shape[2] for a in self.arrays.values()), 0)
        self.length = length

    def snapshot(self) -> TokenArrays:
        """The same buffers with today's length, whatever is appended later."""
        return TokenArrays(self.arrays, self.length, self.growth)

    def append(self, new: Mapping[str, mx.array]) -> None:
        """Write tokens (B, H, N, .) of every array behind the present ones."""
        start = stop = self.length
        for name, tokens in new.items():
            stop = start + tokens.shape[2]
            buffer = self.arrays.get(name)
            if buffer is None or stop > buffer.shape[2]:
                buffer = self._grown(name, tokens, stop)
                self.arrays = {**self.arrays, name: buffer}
            buffer[:, :, start:stop] = tokens
        self.length = stop

    def _grown(self, name: str, like: mx.array, length: int) -> mx.array:
        batch, heads, _, width = like.shape
        # At least one growth: kernels do not take arrays of under 8 elements.
        capacity = max(1, -(-length // self.growth)) * self.growth
        # Zeros, because kernels read whole tiles: what lies behind the last token is
        # counted for nothing, but must not be NaN.
        buffer = mx.zeros((batch, heads, capacity, width), like.dtype)
        if self.length:
            buffer[:, :, : self.length] = self.view(name)
        return buffer

    def view(self, name: str, heads: slice = slice(None)) -> mx.array:
        """The tokens in use of one array: (B, heads, length, .)."""
        return self.arrays[name][:, heads, : self.length]

    def views(self) -> dict[str, mx.array]:
        """`view` of every array."""
        return {name: self.view(name) for name in self.arrays}

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens; the buffers stay."""
        self.length -= count

    def drop_first(self, count: int) -> None:
        """Forget the first ``count`` tokens; what is left moves to new buffers."""
        self.replace({k: v[:, :, count:] for k, v in self.views().items()})

    def replace(self, tokens: Mapping[str, mx.array]) -> None:
        """Start over in new buffers holding just ``tokens``, which may be empty."""
        self.arrays, self.length = {}, 0
        if tokens:
            self.append(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffers, capacity included."""
        return sum(array.nbytes for array in self.arrays.values())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.arrays.items())
        return f"TokenArrays({self.length} tokens: {shapes}; {self.nbytes} bytes)"

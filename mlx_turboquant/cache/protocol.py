"""What is asked of one sequence's cache besides its tokens: masks, sizes, arrays.

`SequenceCache` is a mixin whose answers follow from ``offset`` and what is stored. The
masks are those of mlx-lm's own caches, written again because the package's core must
import without mlx-lm.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx

from ..segments import PreparedSteps
from ..spec import CacheSpec
from .quantizers import LayerQuantizers
from .shallow import Forks
from .stored import StoredTokens


def causal_mask(n: int, offset: int, window_size: int | None = None) -> mx.array:
    """Bool (n, offset + n): query i sees tokens up to offset + i, True attends.

    Args:
        n: New tokens.
        offset: Tokens before them.
        window_size: See only the last ``window_size`` tokens, or all if None.
    """
    last = mx.arange(offset, offset + n)[:, None]
    token = mx.arange(offset + n)[None]
    mask = token <= last
    if window_size is not None:
        mask = mask & (token > last - window_size)
    return mask


def make_mask(
    n: int, offset: int, return_array: bool, window_size: int | None
) -> mx.array | str | None:
    """What ``cache.make_mask`` returns: an array only where one is needed."""
    if window_size is not None or (return_array and n > 1):
        return causal_mask(n, offset, window_size)
    return None if n == 1 else "causal"


class SequenceCache(Forks):
    """Answers that follow from `offset` and from what is stored.

    Attributes:
        offset: Tokens seen, which is also the position of the next one.
    """

    offset: int
    _tokens: StoredTokens
    _prepared: PreparedSteps
    _quantizers: LayerQuantizers

    @property
    def spec(self) -> CacheSpec:
        """What it stores: with bits of its own once they are chosen."""
        return self._quantizers.spec

    def enter_thread(self) -> bool:
        """Take pages that another thread's caches share into a pool of this one.

        Returns:
            Whether there were any to take.
        """
        moved = self._tokens.enter_thread()
        if moved:
            self._prepared = PreparedSteps()
        return moved

    def is_trimmable(self) -> bool:
        """Always: codes are independent of their neighbours."""
        return True

    def size(self) -> int:
        """Tokens that the next step could see."""
        return self.offset

    def shown_before(self) -> int:
        """Tokens that a step's attention shows besides its own."""
        return self.offset

    def empty(self) -> bool:
        """Whether no token is stored."""
        return self.offset == 0

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask for ``n`` new tokens behind those stored."""
        return make_mask(n, self.offset, return_array, window_size)

    @property
    def sink_length(self) -> int:
        """Tokens in the sink segment."""
        return self._tokens.sink_length

    @property
    def packed_length(self) -> int:
        """Tokens stored as codes."""
        return self._tokens.packed_length

    @property
    def recent_length(self) -> int:
        """Latest tokens stored in the model's dtype."""
        return self._tokens.recent.length

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: codes, scales, means, gains, windows, capacity."""
        return self._tokens.nbytes + self._quantizers.nbytes

    @property
    def shared_nbytes(self) -> int:
        """Bytes of pages that other caches hold, too; they are part of `nbytes`."""
        return self._tokens.table.shared_nbytes

    @property
    def elements(self) -> int:
        """Key and value elements that an uncompressed cache would hold now."""
        recent = self._tokens.recent.arrays.values()
        width = sum(a.shape[0] * a.shape[1] * a.shape[3] for a in recent)
        return self.size() * width

    # Some models tie other work to the cached arrays with ``mx.depends``: they read
    # ``cache.keys`` and put back what ``mx.depends`` returned. So these are real
    # arrays, and setting one replaces the buffer of recent tokens.

    @property
    def keys(self) -> mx.array | None:
        """The buffer of recent keys (B, H, capacity, Dk), or None when empty."""
        return self._tokens.recent.arrays.get("keys")

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._replace_recent("keys", array)

    @property
    def values(self) -> mx.array | None:
        """The buffer of recent values (B, H, capacity, Dv), or None when empty."""
        return self._tokens.recent.arrays.get("values")

    @values.setter
    def values(self, array: mx.array) -> None:
        self._replace_recent("values", array)

    def _replace_recent(self, name: str, array: mx.array) -> None:
        held = self._tokens.recent.arrays.get(name)
        if held is None or held.shape != array.shape:
            shape = None if held is None else held.shape
            raise ValueError(
                f"recent {name} {array.shape} cannot replace those of {shape}; only "
                "the same array with other dependencies can"
            )
        self._tokens.recent.arrays[name] = array

    def __repr__(self) -> str:
        if self.empty():
            return f"{type(self).__name__}({self.spec}, empty)"
        parts = f"{self.sink_length}+{self.packed_length}+{self.recent_length}"
        bits = "no codes yet"
        if self.packed_length:
            bits = f"{8 * self.nbytes / self.elements:.2f} bits per element"
        return (
            f"{type(self).__name__}({self.spec}, {self.offset} tokens = {parts} "
            f"sink+packed+recent, {self.nbytes} bytes, {bits})"
        )


@functools.lru_cache(maxsize=64)
def positions(offsets: tuple[int, ...]) -> mx.array:
    """Positions of the rows' next tokens, int32 (B,): all layers of a step share it."""
    return mx.array(offsets, dtype=mx.int32)


def right_aligned(rows: Sequence[mx.array]) -> mx.array:
    """Rows (1, H, T, D) of different T as (B, H, longest T, D), zeros before them."""
    longest = max(row.shape[2] for row in rows)
    return mx.concatenate(
        [
            mx.pad(row, [(0, 0), (0, 0), (longest - row.shape[2], 0), (0, 0)])
            for row in rows
        ]
    )

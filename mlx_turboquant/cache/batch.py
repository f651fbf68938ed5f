"""`BatchTurboQuantCache`: rows of different lengths under mlx-lm's batch protocol.

Owns the rows, each a `TurboQuantCache` of one sequence, and which of a step's tokens
belong to which row. Rows never share codes, means or padding, so a row's output is
that of its single stream whatever happens to the others. Nothing is rolled or
padded: right padding is simply not appended.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..errors import UnsupportedError
from ..segments import RowSegments
from .linear import TurboQuantCache
from .masks import causal_mask


class BatchTurboQuantCache:
    """One layer of a batch; build it with `merge`.

    Args:
        rows: The sequences' caches, owned by this object from now on.
    """

    def __init__(self, rows: Sequence[TurboQuantCache]) -> None:
        self.rows = list(rows)
        self._left: list[int] | None = None  # real tokens still to come, while padded

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantCache]) -> BatchTurboQuantCache:
        """A batch of copies of ``caches``, which stay as they are."""
        return cls([copy.deepcopy(cache) for cache in caches])

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[RowSegments, RowSegments]:
        """Append each row's real tokens of keys (B, H, N, D); handles for `attend`."""
        steps = self._take(keys.shape[2])
        fetched = []
        for row, (cache, n) in enumerate(zip(self.rows, steps, strict=True)):
            new = (keys[row : row + 1, :, :n], values[row : row + 1, :, :n])
            fetched.append(cache.update_and_fetch(*new) if n else new)
        k_rows, v_rows = zip(*fetched, strict=True)
        return RowSegments(k_rows, steps), RowSegments(v_rows, steps)

    def _next_steps(self, n: int) -> list[int]:
        if self._left is None:
            return [n] * len(self.rows)
        return [min(n, left) for left in self._left]

    def _take(self, n: int) -> list[int]:
        steps = self._next_steps(n)
        if self._left is not None:
            self._left = [a - b for a, b in zip(self._left, steps, strict=True)]
        return steps

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce a right-padded prompt: row i has ``lengths[i]`` real tokens.

        Raises:
            UnsupportedError: for left padding, which mlx-lm's batching never uses.
        """
        if left_padding is not None and max(left_padding) > 0:
            raise UnsupportedError(
                f"left padding {list(left_padding)} is not supported in a batch",
                "pad on the right and pass lengths= and right_padding=",
            )
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("right_padding needs lengths, the real tokens per row")
            self._left = list(lengths)

    def finalize(self) -> None:
        """The padded prompt is over; every row takes every token again."""
        self._left = None

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """None or ``"causal"`` per row; as an array, columns are right-aligned."""
        if window_size is None and not return_array:
            return None if n == 1 else "causal"
        longest = max(row.offset for row in self.rows) + n
        masks = []
        for row, steps in zip(self.rows, self._next_steps(n), strict=True):
            mask = causal_mask(steps, row.offset, window_size)
            pad = [(0, n - steps), (longest - mask.shape[1], 0)]
            masks.append(mx.pad(mask, pad))
        return mx.stack(masks)[:, None]

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep only these rows, in this order."""
        keep = [int(i) for i in batch_indices]
        self.rows = [self.rows[i] for i in keep]
        if self._left is not None:
            self._left = [self._left[i] for i in keep]

    def extend(self, other: BatchTurboQuantCache) -> None:
        """Append the other batch's rows."""
        self.rows += other.rows

    def extract(self, idx: int) -> TurboQuantCache:
        """A copy of one row as a cache of its own."""
        return copy.deepcopy(self.rows[idx])

    def is_trimmable(self) -> bool:
        """Always."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every row; returns the most forgotten."""
        return max((row.trim(n) for row in self.rows), default=0)

    @property
    def offset(self) -> mx.array:
        """Tokens per row, int32 (B,): the position of each row's next token."""
        return mx.array([row.offset for row in self.rows], dtype=mx.int32)

    def size(self) -> int:
        """Tokens of the longest row."""
        return max((row.offset for row in self.rows), default=0)

    def empty(self) -> bool:
        """Whether no row holds a token."""
        return self.size() == 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(row.nbytes for row in self.rows)

    @property
    def state(self) -> list[Any]:
        """The rows' states; batches are evaluated, not saved."""
        return [row.state for row in self.rows]

    def __repr__(self) -> str:
        lengths = [row.offset for row in self.rows]
        return f"BatchTurboQuantCache(rows of {lengths} tokens, {self.nbytes} bytes)"

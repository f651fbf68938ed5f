"""`BatchTurboQuantCache`: rows of different lengths, batched as mlx-lm and mlx-vlm do.

Owns the rows, each a `TurboQuantCache` of one sequence, and which of a step's tokens
belong to which row. Rows may hold the same pages, but what one does is nothing to the
others: its output is that of its single stream. Nothing is rolled or padded: padding is
simply not appended. Decode steps are taken together where they can be (`joined`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..batch_handles import CompressedBatch, CompressedGroups, CompressedRows
from ..page_table import held_nbytes
from .groups import RowGroups
from .layer import TurboQuantCache
from .protocol import positions, right_aligned
from .schedule import is_short
from .shallow import Forks, shallow

#: Real tokens to come of a row that nothing pads.
_UNPADDED = 1 << 30

Fetched = (
    tuple[CompressedBatch, CompressedBatch]
    | tuple[CompressedGroups, CompressedGroups]
    | tuple[CompressedRows, CompressedRows]
    | tuple[mx.array, mx.array]
)


class BatchTurboQuantCache(Forks):
    """One layer of a batch; build it with `merge`.

    Args:
        rows: The sequences' caches, owned by this object from now on.
    """

    def __init__(self, rows: Sequence[TurboQuantCache]) -> None:
        self._rows = list(rows)
        self._joined: RowGroups | None = None
        # Padding tokens still to come on the left of each row.
        self._left_padding = [0] * len(self._rows)
        # Real tokens still to come of each row; None unless the prompt is right-padded.
        self._remaining: list[int] | None = None
        # From where to where the latest step's tokens are real, row by row.
        self._spans: list[tuple[int, int]] = []

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantCache]) -> BatchTurboQuantCache:
        """A batch of copies of ``caches``, which stay as they are."""
        return cls([cache.fork() for cache in caches])

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchTurboQuantCache:
        self._part()
        other = memo[id(self)] = shallow(self)
        other._rows = [copy.deepcopy(row, memo) for row in self._rows]
        other._left_padding = list(self._left_padding)
        other._remaining = self._remaining and list(self._remaining)
        return other

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Fetched:
        """Append each row's real tokens of keys (B, H, N, D).

        Returns:
            Handles for `attend`; or, for a model that computes attention itself,
            arrays whose rows are right-aligned, as `make_mask` has them.
        """
        step = keys.shape[2]
        self._spans = self._take(step)
        joined = self._join(step)
        if joined is not None:
            return joined.update_and_fetch(keys, values)
        self._part()
        nothing = (keys[:1, :, :0], values[:1, :, :0])
        fetched = []
        for row, (start, stop) in enumerate(self._spans):
            if stop > start:
                part = (slice(row, row + 1), slice(None), slice(start, stop))
                new = self._rows[row].update_and_fetch(keys[part], values[part])
                fetched.append(new)
            else:
                fetched.append(_held(self._rows[row], nothing))
        return self._as_batch(fetched)

    def keys_and_values(self) -> Fetched:
        """What `update_and_fetch` returned last, for layers that share a cache."""
        if self._joined is not None:
            return self._joined.compressed()
        keys, values = next(row.compressed() for row in self._rows if not row.empty())
        nothing = (keys.recent[:, :, :0], values.recent[:, :, :0])
        return self._as_batch([_held(row, nothing) for row in self._rows])

    @property
    def rows(self) -> list[TurboQuantCache]:
        """The sequences' caches, each with all of its tokens."""
        self._part()
        return self._rows

    def _join(self, step: int) -> RowGroups | None:
        """The rows in groups, if some can take a step of so many tokens together."""
        if not is_short(step) or set(self._spans) != {(0, step)}:
            return None
        joined = self._joined or RowGroups.of(self._rows)
        # What a row packs may change who can join it, once.
        while joined is not None and not joined.make_room():
            joined = RowGroups.of(joined.part())
        self._joined = joined
        return joined

    def _part(self) -> None:
        """Rows go on alone."""
        if self._joined is not None:
            self._rows, self._joined = self._joined.part(), None

    def _as_batch(self, fetched: Sequence[tuple[Any, Any]]) -> Fetched:
        k_rows, v_rows = zip(*fetched, strict=True)
        if self._returns_arrays:
            return right_aligned(k_rows), right_aligned(v_rows)
        return CompressedRows(k_rows, self._spans), CompressedRows(v_rows, self._spans)

    @property
    def _returns_arrays(self) -> bool:
        return any(row.returns_arrays for row in self._rows)

    def _next_spans(self, n: int) -> list[tuple[int, int]]:
        """Where each row's real tokens stand among the next ``n``."""
        starts = [min(n, skip) for skip in self._left_padding]
        if self._remaining is None:
            return [(start, n) for start in starts]
        return [
            (start, min(n, start + tokens))
            for start, tokens in zip(starts, self._remaining, strict=True)
        ]

    def _take(self, n: int) -> list[tuple[int, int]]:
        spans = self._next_spans(n)
        self._left_padding = [
            padding - start
            for padding, (start, _) in zip(self._left_padding, spans, strict=True)
        ]
        if self._remaining is not None:
            self._remaining = [
                tokens - (stop - start)
                for tokens, (start, stop) in zip(self._remaining, spans, strict=True)
            ]
        return spans

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce a padded prompt, which must be over before `finalize`.

        Args:
            left_padding: Tokens to skip in each row first; its positions are negative,
                as in mlx-lm.
            lengths: Real tokens of each row, needed with right padding.
            right_padding: Tokens behind them to skip.

        Raises:
            ValueError: if ``right_padding`` comes without ``lengths``.
        """
        if left_padding is not None:
            pads = zip(self._left_padding, left_padding, strict=True)
            self._left_padding = [skip + int(pad) for skip, pad in pads]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("right_padding needs lengths, the real tokens per row")
            self._remaining = [int(length) for length in lengths]

    def finalize(self) -> None:
        """The padded prompt is over; every row takes every token again."""
        self._remaining = None

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """None or ``"causal"`` if that is true of each row; else right-aligned columns.

        Returns:
            For rows of one's own masks: bool (B, 1, n, longest row after the step).
            Padded queries see all columns, so that no softmax is over nothing.
        """
        spans = self._next_spans(n)
        aligned = self._returns_arrays and (
            len({row.offset for row in self._rows}) > 1 or set(spans) != {(0, n)}
        )
        whole = [row.make_mask(n, return_array, window_size) for row in self._rows]
        if not aligned and not any(isinstance(mask, mx.array) for mask in whole):
            return whole[0] if whole else None
        columns = [
            row.shown_before() + stop - start
            for row, (start, stop) in zip(self._rows, spans, strict=True)
        ]
        longest, masks = max(columns), []
        for row, (start, stop), width in zip(self._rows, spans, columns, strict=True):
            steps = stop - start
            mask = row.make_mask(steps, True, window_size) if steps else None
            if not isinstance(mask, mx.array):
                mask = mx.ones((steps, width), mx.bool_)
            mask = mx.pad(mask, [(0, 0), (longest - width, 0)])
            before, behind = mx.ones((start, longest)), mx.ones((n - stop, longest))
            masks.append(mx.concatenate([before, mask, behind]).astype(mx.bool_))
        return mx.stack(masks)[:, None]

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep only these rows, in this order; one that comes again is forked."""
        keep = [int(i) for i in batch_indices]
        differ = len(set(keep)) == len(keep) > 0
        if self._joined is not None and not (differ and self._joined.keep_only(keep)):
            self._part()
        self._rows = [
            self._rows[row].fork() if row in keep[:i] else self._rows[row]
            for i, row in enumerate(keep)
        ]
        self._left_padding = [self._left_padding[i] for i in keep]
        if self._remaining is not None:
            self._remaining = [self._remaining[i] for i in keep]

    def extend(self, other: BatchTurboQuantCache) -> None:
        """Append forks of the other batch's rows, which stay as they are."""
        self._part()
        other._part()
        if self._remaining is not None or other._remaining is not None:
            self._remaining = [
                *(self._remaining or [_UNPADDED] * len(self._rows)),
                *(other._remaining or [_UNPADDED] * len(other._rows)),
            ]
        self._rows += [row.fork() for row in other._rows]
        self._left_padding += list(other._left_padding)

    def extract(self, idx: int) -> TurboQuantCache:
        """A copy of one row as a cache of its own; pages of codes are shared."""
        self._part()
        return self._rows[idx].fork()

    def is_trimmable(self) -> bool:
        """Whether every row is."""
        return all(row.is_trimmable() for row in self._rows)

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens of every row; returns the most forgotten."""
        if self._joined is not None and n > 0 and self._joined.drop_last(n):
            return n
        self._part()
        return max((row.trim(n) for row in self._rows), default=0)

    @property
    def offset(self) -> mx.array:
        """Position of each row's next token, int32 (B,); negative in left padding."""
        pairs = zip(self._rows, self._left_padding, strict=True)
        return positions(tuple(row.offset - padding for row, padding in pairs))

    def size(self) -> int:
        """Tokens of the longest row."""
        return max((row.offset for row in self._rows), default=0)

    def empty(self) -> bool:
        """Whether no row holds a token."""
        return self.size() == 0

    # Real arrays that some models tie other work to with ``mx.depends``: one row's, as
    # all rows are evaluated together.

    @property
    def keys(self) -> mx.array | None:
        """Recent keys of the first row that has any."""
        return self._anchor("keys")

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._set_anchor("keys", array)

    @property
    def values(self) -> mx.array | None:
        """Recent values of the first row that has any."""
        return self._anchor("values")

    @values.setter
    def values(self, array: mx.array) -> None:
        self._set_anchor("values", array)

    def _anchor(self, name: str) -> mx.array | None:
        if self._joined is not None:
            return self._joined.arrays[name]
        row = self._first_row
        array: mx.array | None = None if row is None else getattr(row, name)
        return array

    def _set_anchor(self, name: str, array: mx.array) -> None:
        if self._joined is not None:
            self._joined.arrays[name] = array
        elif self._first_row is not None:
            setattr(self._first_row, name, array)

    @property
    def _first_row(self) -> TurboQuantCache | None:
        return next((row for row in self._rows if not row.empty()), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows; a page that several of them hold counts once."""
        joined = [] if self._joined is None else self._joined.buffers
        tables = [row._tokens.table for row in self._rows]
        alone = sum(row.nbytes - row._tokens.table.nbytes for row in self._rows)
        return alone + held_nbytes(tables) + sum(a.nbytes for a in joined)

    @property
    def state(self) -> list[Any]:
        """The rows' states; batches are evaluated, not saved."""
        joined = [] if self._joined is None else self._joined.buffers
        return [*joined, *(row.state for row in self._rows)]

    def __repr__(self) -> str:
        lengths = [row.offset for row in self._rows]
        return f"BatchTurboQuantCache(rows of {lengths} tokens, {self.nbytes} bytes)"


def _held(cache: TurboQuantCache, nothing: tuple[mx.array, mx.array]) -> Any:
    return nothing if cache.empty() else cache.keys_and_values()

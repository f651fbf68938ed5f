"""`JoinedRows`: rows of a batch whose short steps are stored and attended to at once.

Codes of all rows lie in one pool, their recent tokens in one buffer, where they end
together: a step is one write and one attention, however many rows there are. Rows keep
all else, and get their recent tokens back when they go on alone.

Owns that buffer. When a row packs what is the row's own schedule's.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence

import mlx.core as mx

from ..batch_handles import CompressedBatch
from ..page_table import Moved
from ..segments import PreparedSteps, RowTokens
from .layer import TurboQuantCache
from .sliding import RotatingTurboQuantCache

#: Tokens that the buffer has room for when it is laid out.
_ROOM = 128
_SIDES = ("keys", "values")


def kind_of(row: TurboQuantCache) -> Hashable | None:
    """What rows that one launch can serve have in common; None for one that cannot be.

    Such a row has its final codecs and a backend that takes several at once, and leaves
    attention to it.
    """
    if row.empty() or row.returns_arrays or not row._schedule.is_packing:
        return None
    backend = row._quantizers.choice.backend
    keys = row._tokens.recent.arrays["keys"]
    if not backend.joins or keys.shape[0] != 1 or row._wants_all_queries:
        return None
    window = None
    if isinstance(row, RotatingTurboQuantCache):
        window = row.max_size, row.keep
    spec, kind = row.spec, row._quantizers.kind
    return kind, id(backend), spec, window, keys.shape[1], keys.dtype


class JoinedRows:
    """Rows that take their steps together.

    Args:
        rows: The sequences' caches, of one `kind_of`. Their recent tokens are here
            until `part`.
    """

    def __init__(self, rows: Sequence[TurboQuantCache]) -> None:
        self.rows = list(rows)
        self._backend = rows[0]._quantizers.choice.backend
        self._step = 0
        self._recent: dict[str, mx.array] = {}
        self._lasting, self._sinks = PreparedSteps(), [r._tokens.sink for r in rows]
        self._lay_out({name: self._views(name) for name in _SIDES})

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Buffers (B, H, capacity, .) of recent keys and values."""
        return self._recent

    def _views(self, name: str) -> list[mx.array]:
        return [row._tokens.recent.view(name) for row in self.rows]

    def _lay_out(self, tokens: dict[str, list[mx.array]]) -> None:
        """Put each row's recent tokens (1, H, N, .) into new buffers."""
        lengths = [row.recent_length for row in self.rows]
        self._stop = max(lengths)
        self._firsts = [self._stop - length for length in lengths]
        for name, views in tokens.items():
            parts = [
                mx.pad(view, [(0, 0), (0, 0), (first, _ROOM), (0, 0)])
                for view, first in zip(views, self._firsts, strict=True)
            ]
            self._recent[name] = mx.concatenate(parts)
        for row in self.rows:
            # No views: the buffer would be copied when it is written to.
            recent = row._tokens.recent
            recent.arrays = {
                name: mx.zeros((1, a.shape[1], 0, a.shape[3]), a.dtype)
                for name, a in self._recent.items()
            }
        self._changed()

    def _changed(self) -> None:
        """Codes, members or places in the buffer are not what they were."""
        # A row that packed its first page, or forgot a window's, may have left.
        pools = (row._tokens.table.pool for row in self.rows)
        largest = max(pools, key=lambda pool: pool.held)
        moved: Moved = {}
        for row in self.rows:
            row.move_to(largest, moved)
        self._prepared = PreparedSteps()
        self._seen = [row._prepared for row in self.rows]
        self._tokens = [_tokens_of(row) for row in self.rows]
        sinks = [row._tokens.sink for row in self.rows]
        if len(sinks) != len(self._sinks) or any(
            map(operator.is_not, sinks, self._sinks)
        ):
            self._lasting, self._sinks = PreparedSteps(), sinks

    def make_room(self) -> bool:
        """Pack what is due before a step; whether rows still can take it together.

        A proof may have come meanwhile that changes what attends to a row.
        """
        # They are in one pool: looking at one row of many is enough.
        if self.rows[0].enter_thread():
            for row in self.rows[1:]:
                row.enter_thread()
        for index, row in enumerate(self.rows):
            row.make_room()
            if row.offset >= row._schedule.next_page_at:
                self._pack(index)
        return all(row._backend in (None, self._backend) for row in self.rows)

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[CompressedBatch, CompressedBatch]:
        """As `TurboQuantCache.update_and_fetch` of every row, for a short step.

        `make_room` comes first.
        """
        step = self._step = keys.shape[2]
        stop = self._stop + step
        if stop > self._recent["keys"].shape[2]:
            self._lay_out({name: self._own_views(name) for name in _SIDES})
            stop = self._stop + step
        for name, new in zip(_SIDES, (keys, values), strict=True):
            self._recent[name][:, :, self._stop : stop] = new
        self._stop = stop
        for row in self.rows:
            row.offset += step
            row._tokens.recent.length += step
        if any(
            r._prepared is not p for r, p in zip(self.rows, self._seen, strict=True)
        ):
            self._changed()
        return self.compressed()

    def compressed(self) -> tuple[CompressedBatch, CompressedBatch]:
        """Handles over everything stored."""
        row = self.rows[0]
        keep, most_shown = 0, None
        if isinstance(row, RotatingTurboQuantCache):
            keep, most_shown = row.keep, row.max_size - 1 + self._step
        keys, values = (
            CompressedBatch(
                [tokens[side] for tokens in self._tokens],
                self._recent[name],
                tuple(self._firsts),
                self._stop,
                self._backend,
                self._prepared,
                self._lasting,
                keep,
                most_shown,
            )
            for side, name in enumerate(_SIDES)
        )
        return keys, values

    def _pack(self, index: int) -> None:
        """Let one row encode what is due, from the buffer."""
        row = self.rows[index]
        recent = row._tokens.recent
        before, nothing = recent.length, dict(recent.arrays)
        recent.arrays = self._views_of(index)
        row._pack()
        recent.arrays = nothing
        self._firsts[index] += before - recent.length

    def _views_of(self, index: int) -> dict[str, mx.array]:
        own = slice(self._firsts[index], self._stop)
        return {n: a[index : index + 1, :, own] for n, a in self._recent.items()}

    def _own_views(self, name: str) -> list[mx.array]:
        return [self._views_of(index)[name] for index in range(len(self.rows))]

    def keep_only(self, indices: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        tokens = {n: [self._views_of(i)[n] for i in indices] for n in _SIDES}
        self.rows = [self.rows[i] for i in indices]
        self._lasting = PreparedSteps()
        self._lay_out(tokens)

    def drop_last(self, count: int) -> bool:
        """Forget the last ``count`` tokens of every row, if all are recent."""
        if any(
            row.recent_length <= count or not row.is_trimmable() for row in self.rows
        ):
            return False
        for row in self.rows:
            row.trim(count)
        self._stop -= count
        return True

    def part(self) -> list[TurboQuantCache]:
        """The rows, with their recent tokens."""
        for index, row in enumerate(self.rows):
            own = self._views_of(index)
            row._tokens.recent.arrays = {n: mx.contiguous(a) for n, a in own.items()}
        return self.rows


def _tokens_of(row: TurboQuantCache) -> tuple[RowTokens, ...]:
    """Keys and values of a row, but for recent ones."""
    sides, tokens = row._quantizers.sides, row._tokens
    assert sides is not None, "rows that join have packed tokens"
    return tuple(
        RowTokens(
            quantizer, tokens.sink.get(side), codes if row.packed_length else None
        )
        for (side, quantizer), codes in zip(sides.items(), tokens.packed, strict=True)
    )

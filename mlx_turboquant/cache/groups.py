"""`RowGroups`: rows of a batch in groups that take a short step together.

Rows whose codes have the same form are one group (`joined`); a row that has no page
yet, or that no other can join, is a group of its own. Owns who is in which.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import mlx.core as mx

from ..batch_handles import CompressedBatch, CompressedGroups
from ..segments import CompressedTokens
from .joined import JoinedRows, kind_of
from .layer import TurboQuantCache

#: Handles of keys and of values.
Handles = (
    tuple[CompressedBatch, CompressedBatch] | tuple[CompressedGroups, CompressedGroups]
)


#: Which rows, and their handle.
Part = tuple[Sequence[int], CompressedTokens | CompressedBatch]


class RowGroups:
    """The rows of a batch, some of which can take steps together.

    Args:
        rows: The sequences' caches. Recent tokens of those that joined are with their
            group until `part`.
        kinds: `kind_of` each of them.
    """

    def __init__(
        self, rows: Sequence[TurboQuantCache], kinds: Sequence[Hashable | None]
    ) -> None:
        self._rows = list(rows)
        self._alone = [i for i, kind in enumerate(kinds) if kind is None]
        members: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            if kind is not None:
                members.setdefault(kind, []).append(index)
        self._joined = [
            (indices, JoinedRows([rows[i] for i in indices]))
            for indices in members.values()
        ]
        self._stepped: list[tuple[CompressedTokens, CompressedTokens]] = []

    @classmethod
    def of(cls, rows: Sequence[TurboQuantCache]) -> RowGroups | None:
        """Groups of these rows; None if no row can join any other."""
        kinds = [kind_of(row) for row in rows]
        return None if all(kind is None for kind in kinds) else cls(rows, kinds)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Buffers of recent keys and values of the first group."""
        return self._joined[0][1].arrays

    @property
    def buffers(self) -> list[mx.array]:
        """Those of all groups."""
        return [a for _, group in self._joined for a in group.arrays.values()]

    def make_room(self) -> bool:
        """Pack what is due before a step; whether groups are still what they were."""
        stay = [group.make_room() for _, group in self._joined]
        return all(stay) and all(kind_of(self._rows[i]) is None for i in self._alone)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Handles:
        """Store a short step's keys (B, H, N, D) and values, behind `make_room`."""
        if self._is_one:
            return self._joined[0][1].update_and_fetch(keys, values)
        for indices, group in self._joined:
            some = mx.array(indices)
            group.update_and_fetch(keys[some], values[some])
        self._stepped = []
        for i in self._alone:
            own = slice(i, i + 1)
            k, v = self._rows[i].update_and_fetch(keys[own], values[own])
            assert isinstance(k, CompressedTokens)
            assert isinstance(v, CompressedTokens)
            self._stepped.append((k, v))
        return self.compressed()

    @property
    def _is_one(self) -> bool:
        return len(self._joined) == 1 and not self._alone

    def compressed(self) -> Handles:
        """Handles over everything stored, after the latest step."""
        if self._is_one:
            return self._joined[0][1].compressed()
        keys: list[Part] = []
        values: list[Part] = []
        for indices, group in self._joined:
            k_batch, v_batch = group.compressed()
            keys.append((indices, k_batch))
            values.append((indices, v_batch))
        for i, (k, v) in zip(self._alone, self._stepped, strict=True):
            keys.append(([i], k))
            values.append(([i], v))
        return CompressedGroups(keys), CompressedGroups(values)

    def keep_only(self, indices: Sequence[int]) -> bool:
        """Go on with these rows, in this order, if they are all one group."""
        if self._is_one:
            self._joined[0][1].keep_only(indices)
            self._rows = [self._rows[i] for i in indices]
            self._joined = [(list(range(len(indices))), self._joined[0][1])]
        return self._is_one

    def drop_last(self, count: int) -> bool:
        """Forget the last ``count`` tokens of all rows, if one group has them all."""
        return self._is_one and self._joined[0][1].drop_last(count)

    def part(self) -> list[TurboQuantCache]:
        """The rows, with their recent tokens."""
        for _, group in self._joined:
            group.part()
        return self._rows

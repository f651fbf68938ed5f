"""What attention sees of a layer of several sequences: handles of batches.

`CompressedBatch` are sequences that a backend may attend to at once, `CompressedGroups`
several of those and single ones, `CompressedRows` rows that are taken one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from .segments import (
    CompressedKV,
    CompressedTokens,
    PreparedSteps,
    QueryObserver,
    RowTokens,
    Shape,
)


@dataclass(slots=True, eq=False)
class CompressedBatch(CompressedKV):
    """One side of a layer of independent sequences of different lengths.

    All are stored with the same spec, calibrated, and get the same steps, so that their
    recent tokens end together in one buffer. Codes and means of all lie in the same
    buffers, row 0, each row's tiles where its own `TokenArrays.tiles` say.

    Attributes:
        rows: What each row has besides.
        recent: Buffer (B, H, capacity, D) of the last tokens as the model gave them.
        firsts: Where in it each row's first recent token is.
        stop: Where the last one of all rows ends; every row has one at least.
        backend: What attends to the packed tokens.
        prepared: What that backend keeps from step to step; a new one whenever
            membership, or a row's packed tokens, sink or place in the buffer, change.
        lasting: What it keeps as long as members and their sinks stay the same.
        keep: First tokens of a row that are always shown, of a sliding window.
        most_shown: Tokens of a row that a step of so many sees, its own included; None
            if there is no window. Others, behind the first ``keep``, are hidden.
    """

    rows: Sequence[RowTokens]
    recent: mx.array
    firsts: Sequence[int]
    stop: int
    backend: Any
    prepared: PreparedSteps
    lasting: PreparedSteps = field(default_factory=PreparedSteps)
    keep: int = 0
    most_shown: int | None = None

    @property
    def shape(self) -> Shape:
        """(B, H, longest T, D) over all segments, but hidden tokens."""
        batch, heads, _, dim = self.recent.shape
        longest = max(self._stored(index) for index in range(len(self.rows)))
        shown = longest if self.most_shown is None else min(longest, self.most_shown)
        return batch, heads, shown, dim

    def _stored(self, index: int) -> int:
        """Tokens of a row, hidden ones included."""
        row = self.rows[index]
        recent = self.stop - self.firsts[index]
        return row.sink_length + row.packed_length + recent

    def alone(self) -> list[CompressedTokens]:
        """Each row's own handle (1, H, T, D)."""
        handles = []
        for index, (row, first) in enumerate(zip(self.rows, self.firsts, strict=True)):
            hidden = 0
            if self.most_shown is not None:
                hidden = max(0, self._stored(index) - self.most_shown)
            handles.append(
                CompressedTokens(
                    row.quantizer,
                    row.sink,
                    row.packed,
                    self.recent[index : index + 1, :, first : self.stop],
                    self.stop - first,
                    (self.keep if hidden else 0, hidden),
                    self.backend,
                )
            )
        return handles

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype, that of the uncompressed segments."""
        return self.recent.dtype

    @property
    def observer(self) -> None:
        """None: its rows are calibrated."""

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Nobody wants to see them."""

    def __repr__(self) -> str:
        return f"CompressedBatch({', '.join(map(repr, self.alone()))})"


@dataclass(slots=True, eq=False)
class CompressedGroups(CompressedKV):
    """A batch of rows in groups that are attended to at once.

    Attributes:
        parts: Which rows of the batch, and their handle.
    """

    parts: Sequence[tuple[Sequence[int], CompressedTokens | CompressedBatch]]

    @property
    def shape(self) -> Shape:
        """(B, H, longest T, D)."""
        shapes = [part.shape for _, part in self.parts]
        _, heads, _, dim = shapes[0]
        return sum(s[0] for s in shapes), heads, max(s[2] for s in shapes), dim

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype."""
        return self.parts[0][1].dtype

    @property
    def observer(self) -> QueryObserver | None:
        """The first cache of the batch that wants to see queries."""
        observers = (part.observer for _, part in self.parts)
        return next((o for o in observers if o is not None), None)

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Hand queries q (B, Hq, L, D) to the caches that want to see theirs."""
        for rows, part in self.parts:
            if part.observer is not None:
                part.observe_queries(q[mx.array(list(rows))], scale)


@dataclass(slots=True, eq=False)
class CompressedRows(CompressedKV):
    """A batch of rows of different lengths, each with its own handle.

    Attributes:
        rows: Per row, what its own cache returned: a `CompressedTokens`, or an array
            (1, H, T, D) while the row holds nothing older than this step.
        spans: Per row, from where to where this step's tokens are real; what is before
            and behind is padding whose output nobody reads.
    """

    rows: Sequence[CompressedTokens | mx.array]
    spans: Sequence[tuple[int, int]]

    @property
    def shape(self) -> Shape:
        """(B, H, longest T, D)."""
        shapes = [row.shape for row in self.rows]
        _, heads, _, dim = shapes[0]
        return len(shapes), heads, max(shape[2] for shape in shapes), dim

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype."""
        return self.rows[0].dtype

    @property
    def observer(self) -> QueryObserver | None:
        """The first cache of the batch that wants to see queries."""
        observers = (getattr(row, "observer", None) for row in self.rows)
        return next((o for o in observers if o is not None), None)

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Hand each row's real queries of q (B, Hq, L, D) to its cache."""
        for index, (row, (start, stop)) in enumerate(
            zip(self.rows, self.spans, strict=True)
        ):
            if isinstance(row, CompressedTokens) and stop > start:
                row.observe_queries(q[index : index + 1, :, start:stop], scale)

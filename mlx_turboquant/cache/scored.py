"""`ScoredTurboQuantCache`: a bounded cache that forgets what attention needs least.

Owns which pages go when there are more tokens than ``max_size``; scores are
`page_scores`'. How many go depends on how many tokens are stored alone, so that all
layers show equally many, each those of its own choice.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Any, cast

import mlx.core as mx

from . import state as saved
from .page_scores import QUERIES, kept_pages
from .protocol import make_mask
from .sliding import RotatingTurboQuantCache

#: Of so many pages one is forgotten at a time, at least.
_SLACK = 32


class ScoredTurboQuantCache(RotatingTurboQuantCache):
    """A `RotatingTurboQuantCache` that drops pages by score, not by age.

    Takes the place of a ``KVCache`` under ``max_kv_size``, never that of a window that
    a model was made with. Tokens keep their positions. Until ``max_size`` tokens are
    stored it is a `TurboQuantCache`; from then on, whole pages are forgotten before
    each step that would see more.

    Args:
        spec: What to store; ``keep`` tokens are part of its sink.
        max_size: Tokens a step sees, itself included.
        keep: First tokens that are never forgotten, as all of the sink here.
        slot: Its place among the layers whose bits are chosen together; alone if None.

    Raises:
        SpecError: as `RotatingTurboQuantCache`.

    >>> ScoredTurboQuantCache("k3v3", max_size=1024)
    ScoredTurboQuantCache(k3v3, empty)
    """

    _header_marks = ("max_size", "scored")
    _wants_all_queries = True

    def _clear(self) -> None:
        super()._clear()
        self._queries: deque[mx.array] = deque()
        self._scale = 1.0

    def make_room(self) -> None:
        """Forget the pages that score least, until a step sees under ``max_size``."""
        if self._excess() <= 0:
            return
        if self.offset >= self._schedule.next_page_at:
            self._pack()
        page = self.spec.page
        held = self.packed_length // page
        # A large limit forgets several at once: each time all keys are decoded.
        least = max(-(-self._excess() // page), held // _SLACK)
        dropped = min(held, least)
        backend = self._backend
        if dropped <= 0 or backend is None:
            return
        keys, _ = self.compressed()
        kept = kept_pages(
            functools.partial(backend.dequantize, keys),
            self._queries,
            self._scale,
            kv_heads=keys.shape[1],
            first=self.sink_length,
            page=page,
            held=held,
            count=held - dropped,
        )
        self._tokens.drop_pages(set(range(held)) - set(kept))
        self._evicted_pages += dropped * page
        self._codes_changed()

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, and their queries; none once pages are gone."""
        trimmed = super().trim(n)
        left = trimmed
        while left > 0 and self._queries:
            latest = self._queries.pop()
            if latest.shape[2] > left:
                self._queries.append(latest[:, :, :-left])
            left -= latest.shape[2]
        return trimmed

    def _excess(self) -> int:
        return self._tokens.length - (self.max_size - 1)

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """See the queries of the step just stored: the latest score the pages.

        Args:
            q: Queries (B, Hq, L, D) of the last L tokens.
            scale: Factor on the logits.
        """
        super().observe_queries(q, scale)
        self._scale = scale
        if q.shape[2] > QUERIES:
            # A slice would hold all of a prompt's queries until it is computed.
            q = mx.contiguous(q[:, :, -QUERIES:])
            cast(Any, mx.async_eval)(q)
        self._queries.append(q)
        more = sum(seen.shape[2] for seen in self._queries) - QUERIES
        while more >= self._queries[0].shape[2]:
            more -= self._queries.popleft().shape[2]

    def size(self) -> int:
        """Tokens that the next step could see, at most ``max_size``."""
        return min(self._tokens.length, self.max_size)

    def shown_before(self) -> int:
        """Tokens that a step's attention shows besides its own."""
        self.make_room()
        return self._tokens.length

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask for ``n`` new tokens over all that is shown."""
        return make_mask(n, self.shown_before(), return_array, window_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScoredTurboQuantCache:
        other = super().__deepcopy__(memo)
        assert isinstance(other, ScoredTurboQuantCache)
        other._queries = deque(self._queries)
        return other

    def _numbers(self) -> saved.Numbers:
        return {**super()._numbers(), "scored": 1}

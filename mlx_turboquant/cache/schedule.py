"""`PackingSchedule`: when tokens become codes. The one place that decides it.

After n tokens, ``page * ((n - sink - window) // page)`` of them are codes, whatever the
steps they came in. A layer goes through these phases:

    COLLECTING   the first page is not full
    CALIBRATING  it is full; gains wait for the queries of the step that filled it
    WAITING      gains are fixed; bits wait for the other layers to be calibrated
    PACKING      codecs are final, pages are encoded as they become due

A cache asks at three moments whether to go on. In a prompt's first chunk the queries
come last, because attention does; after it a chunk is packed as soon as it is stored, so
that no layer holds a prompt's worth of uncompressed tokens. Steps of a few tokens pack
before they are stored, so that a rejected draft token is never encoded:

    moment                      COLLECTING, CALIBRATING   WAITING   PACKING
    before a step is stored     pack                      pack      pack
    after a long step is        -                         pack      pack
    after a long step's queries pack                      -         -
"""

from __future__ import annotations

from enum import Enum

from ..spec import CacheSpec

#: Steps of at most this many tokens are decoding (speculative decoding verifies up to
#: 8); longer ones are prefill.
DECODE_TOKENS = 8


class Phase(Enum):
    """Where a layer stands on its way to codes."""

    COLLECTING = "collecting"
    CALIBRATING = "calibrating"
    WAITING = "waiting"
    PACKING = "packing"


class PackingSchedule:
    """When one layer's tokens become codes.

    Args:
        spec: Its sink, window and page.

    Attributes:
        phase: Where the layer stands; `cache.quantizers` moves it on.
        packed: Tokens that are codes, or were before a sliding window left them.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._uncompressed = spec.sink + spec.window
        self._page = spec.page
        self.phase = Phase.COLLECTING
        self.set_packed(0)

    def set_packed(self, tokens: int) -> None:
        """Say how many tokens are codes by now."""
        self.packed = tokens
        # A trim may have cut a page: then its end is what is due next.
        page_end = (tokens // self._page + 1) * self._page
        self._next_page_at = self._uncompressed + page_end

    @property
    def is_calibrated(self) -> bool:
        """Whether gains are fixed, so that queries need not be seen any more."""
        return self.phase in (Phase.WAITING, Phase.PACKING)

    @property
    def is_packing(self) -> bool:
        """Whether codecs are final."""
        return self.phase is Phase.PACKING

    def packs_before_step(self, stored: int) -> bool:
        """Whether to pack before more tokens come; ``stored`` have been seen."""
        return stored >= self._next_page_at

    def packs_after_step(self, stored: int, step: int) -> bool:
        """Whether to pack now that a step of ``step`` tokens is stored."""
        if step <= DECODE_TOKENS or stored < self._next_page_at:
            return False
        if self.phase is Phase.COLLECTING:
            self.phase = Phase.CALIBRATING
        return self.is_calibrated

    def packs_after_queries(self, stored: int, step: int) -> bool:
        """Whether to pack now that the queries of that step were seen."""
        return (
            step > DECODE_TOKENS
            and stored >= self._next_page_at
            and not self.is_calibrated
        )

    def tokens_due(self, stored: int) -> int:
        """Tokens to encode, so that all that should be codes are."""
        settled = max(0, stored - self._uncompressed)
        return max(0, settled // self._page * self._page - self.packed)

"""`PackingSchedule`: when tokens become codes. The one place that decides it.

When a step begins after n tokens, ``page * ((n - sink - window) // page)`` of them are
codes at least, whatever the steps they came in; a long step makes that true before it
ends. In a short text, where a page of uncompressed tokens would be much of it, a
long step goes on to its last whole tile, ``32 * ((n - sink - window) // 32)``; steps of
a few tokens wait for whole pages, each a stop for the host. So that codes do not depend
on where a step ended, the means of these first pages are of their first tile. A
layer goes through these phases:

    COLLECTING   the first page is not full
    CALIBRATING  it is full; gains wait for the queries of the step that filled it
    WAITING      gains are fixed; bits wait for the other layers to be calibrated
    PACKING      codecs are final, pages are encoded as they become due

A cache asks at three moments whether to pack what is due. In a prompt's first chunk the
queries come last, because attention does; later chunks are packed as soon as they are
stored, so that no layer holds a prompt's worth of uncompressed tokens. Steps of a few
tokens pack before they are stored, so that a rejected draft token is never encoded:

    moment                       COLLECTING, CALIBRATING   WAITING, PACKING
    before a step is stored      pack                      pack
    after a long step is stored  -                         pack
    after its queries were seen  pack                      -
"""

from __future__ import annotations

from enum import Enum

from ..spec import CacheSpec
from ..tokens import TILE

#: Steps of at most this many tokens are decoding (kernels verify so many at once);
#: longer ones are prefill.
DECODE_TOKENS = 16
#: Codes up to which a text is short, rounded down to whole pages.
SHORT_TEXT = 1024


def is_short(step: int) -> bool:
    """Whether a step of so many tokens is decoding, not prefill."""
    return step <= DECODE_TOKENS


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
        is_calibrated: Whether gains are fixed, so that no queries need to be seen.
        packed: Tokens that are codes, or were before a sliding window left them.
        next_page_at: Tokens seen at which the next page is due; below it, there is
            nothing to ask.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._sink, self._uncompressed = spec.sink, spec.sink + spec.window
        self._page = spec.page
        self._short = SHORT_TEXT // spec.page * spec.page
        self._prompt_end = 0  # tokens seen when the last long step was stored
        self.enter(Phase.COLLECTING)
        self.set_packed(0)

    def enter(self, phase: Phase) -> None:
        """Go on to another phase."""
        self.phase = phase
        self.is_calibrated = phase in (Phase.WAITING, Phase.PACKING)

    def set_packed(self, tokens: int) -> None:
        """Say how many tokens are codes by now."""
        self.packed = tokens
        # A trim may have cut a page: then its end is what is due next.
        page_end = (tokens // self._page + 1) * self._page
        self.next_page_at = self._uncompressed + page_end

    @property
    def is_packing(self) -> bool:
        """Whether codecs are final."""
        return self.phase is Phase.PACKING

    def packs_after_step(self, step: int) -> bool:
        """Whether a page that is due is packed when a step of ``step`` is stored."""
        if is_short(step):
            return False
        if self.phase is Phase.COLLECTING:
            self.enter(Phase.CALIBRATING)
        return self.is_calibrated

    def packs_after_queries(self, step: int) -> bool:
        """Whether it is packed when the queries of that step were seen."""
        return not is_short(step) and not self.is_calibrated

    def store(self, stored: int, step: int) -> None:
        """Say that ``stored`` tokens were seen by the end of a step of ``step``."""
        if not is_short(step):
            self._prompt_end = stored

    def trim(self, stored: int) -> None:
        """Say that all tokens but the first ``stored`` were forgotten."""
        self._prompt_end = min(self._prompt_end, stored)

    def tokens_due(self, stored: int) -> int:
        """Tokens to encode, so that all that should be codes are.

        Of those that end a short text no more: the rest is due next.

        Args:
            stored: Tokens seen.
        """
        settled = max(0, stored - self._uncompressed)
        due = settled // self._page * self._page
        if self.packed < self._short:
            if due:
                prompt = self._prompt_end - self._uncompressed
                due = max(due, prompt // TILE * TILE)
            due = min(due, self._short)
        return max(0, due - self.packed)

    def is_due(self, stored: int, step: int) -> bool:
        """Whether anything is to be encoded behind a step of ``step``: a long one."""
        return not is_short(step) and self.tokens_due(stored) > 0

    @property
    def room(self) -> int:
        """Recent tokens that there are at most before a step packs some."""
        return self.next_page_at - self._sink - self.packed + DECODE_TOKENS

    @property
    def mean_sample(self) -> int:
        """Tokens that the mean of a page is of that is encoded next."""
        return min(TILE, self._page) if self.packed < self._short else self._page

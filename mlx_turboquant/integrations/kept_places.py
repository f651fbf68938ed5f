"""Which of the places at which texts are kept matter most: to save, and to keep.

Owns the choice; dropping and saving are `prompt_store`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..conversations import spread
from ..conversations.snapshots import EVERY_IN_BEGINNING
from .kept_text import PLACE, SYSTEM, KeptText

#: Places that texts are left with, one less each time, before a whole one goes.
FEW_PLACES = 3


def likely_places(text: KeptText, beginnings: Sequence[KeptText]) -> list[KeptText]:
    """The ends of a text's last prompt, of itself, and of its system prompt.

    The likelier ones to be gone on from come first. What can be cut is all there is.

    Args:
        text: The text.
        beginnings: What is kept of those that it goes on from, the shortest first.
    """
    if text.keeps_all:
        return [text]
    last = {place.kind: place for place in beginnings}
    places = [last.get(PLACE), text, last.get(SYSTEM)]
    return [place for place in places if place is not None]


def first_to_go(
    kept: Sequence[KeptText], beginnings: Callable[[KeptText], list[KeptText]]
) -> KeptText:
    """What to drop where bytes are short: a place within a text, or a text.

    Texts lose places before one of them goes, those not used for longest first. Places
    that are left are dense at a text's end.

    Args:
        kept: All that is kept.
        beginnings: What is kept of those that one goes on from, the shortest first.
    """
    oldest = sorted(kept, key=lambda entry: (entry.used, -len(entry.tokens)))
    latest = oldest[-1].used
    for few in range(FEW_PLACES, 0, -1):
        place = _least_place(oldest, beginnings, few)
        if place is not None:
            return place
    # Of the latest, what it has read last is what it goes on from.
    return oldest[0] if oldest[0].used < latest else oldest[-1]


def _least_place(
    texts: Sequence[KeptText],
    beginnings: Callable[[KeptText], list[KeptText]],
    few: int,
) -> KeptText | None:
    """Of the first text that has more than ``few`` places, one of them.

    The end of its system prompt, which others will begin with, is none of these, nor is
    the last place well before that: lines at its end change.
    """
    for text in texts:
        places = {len(place.tokens): place for place in beginnings(text)}
        systems = [n for n, place in places.items() if place.kind == SYSTEM]
        if systems:
            end = max(systems)
            before = [n for n in systems if end - n >= EVERY_IN_BEGINNING // 2]
            for n in {end, max(before, default=end)}:
                del places[n]
        if len(places) > few and not text.keeps_all:
            ends = [0, *places, len(text.tokens)]
            return places[spread(ends, len(ends) - 1)[0]]
    return None

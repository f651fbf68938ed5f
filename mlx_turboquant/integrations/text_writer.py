"""`TextWriter`: when a store's texts go to a folder.

Owns what is written, and when: pages soon, the rest of a text when it will not be made
needless by the next turn. Which texts are kept is ``prompt_store.py``'s, what records
are ``saved_texts.py``'s.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.nn as nn

from ..conversations import PrefixIndex
from ..conversations.disk import DiskFolder
from .kept_places import likely_places
from .kept_text import TEXT, KeptText
from .saved_texts import SavedTexts
from .sharing import nbytes_behind_pages

#: Seconds without use after which a text's pages are written, and all of it: what the
#: next turn would make needless is not. Where pages alone cannot be gone on from, all
#: follows at once, as long as it makes no more than half of what is written.
PAGES_AFTER, ALL_AFTER = 2.0, 300.0
#: Seconds until a folder that did not take a text is asked again.
_PAUSE = 60.0


class TextWriter:
    """Writes a store's texts to a folder.

    Args:
        folder: The folder; None for none, and nothing is written.
        index: Finds what is kept of texts that a text goes on from.

    Attributes:
        saved: What is kept of models' texts there, once `open` was called for them.
    """

    def __init__(self, folder: DiskFolder | None, index: PrefixIndex[KeptText]) -> None:
        self._folder, self._index = folder, index
        self.saved: dict[Any, SavedTexts] = {}
        # What a folder did not take is offered again from then on.
        self._idle_from = 0.0
        # When `write` writes all of a text the next time.
        self._whole_from = 0.0

    def open(
        self, model: Any, networks: Sequence[nn.Module], caches: Sequence[Any]
    ) -> None:
        """As `PromptStore.open`."""
        if self._folder is not None and model not in self.saved:
            self.saved[model] = SavedTexts(self._folder, networks, caches)

    def idle(self, kept: Iterable[KeptText]) -> None:
        """Write something that nobody has used for a while, the last used first."""
        now = time.monotonic()
        for entry in self._unsaved(kept):
            idle = now - entry.at
            if idle > ALL_AFTER or (not entry.saved and idle > PAGES_AFTER):
                self.save(entry, whole=idle > ALL_AFTER)
                return
            if entry.saved and self._save_next_place(entry):
                return

    def write(self, kept: Iterable[KeptText]) -> None:
        """Write the pages of all texts at once, the rest of them as seldom as `idle`.

        The next turn makes the rest needless.
        """
        now = time.monotonic()
        whole = now >= self._whole_from
        for entry in self._unsaved(kept):
            if whole or not entry.saved:
                self.save(entry, whole)
            if whole and entry.saved == "all":
                self._whole_from = now + ALL_AFTER

    def save_next(self, kept: Iterable[KeptText]) -> None:
        """Write all of the text that was used last of those not yet written."""
        for entry in self._unsaved(kept)[:1]:
            self.save(entry, whole=True)

    def close(self, kept: Iterable[KeptText], until: float = math.inf) -> None:
        """Write all that is not yet written, the last used first, and close the folder.

        Args:
            kept: All that is kept.
            until: When to begin with no more, `time.monotonic`.
        """
        self._idle_from = 0.0
        unsaved = self._unsaved(kept)
        while unsaved and time.monotonic() < until:
            self.save(unsaved.pop(0), whole=True)
        if unsaved:
            logging.warning(
                f"KV folder: no time was left to write {len(unsaved)} texts"
            )
        if self._folder is not None:
            self._folder.close()

    def _unsaved(self, kept: Iterable[KeptText]) -> list[KeptText]:
        """Texts to write, the last used first; none while a folder takes none."""
        if time.monotonic() < self._idle_from:
            return []
        texts = (entry for entry in kept if entry.kind == TEXT)
        found = (one for one in texts if one.saved != "all" and one.model in self.saved)
        return sorted(found, key=lambda entry: -entry.used)

    def save(self, entry: KeptText, whole: bool) -> None:
        """Write a text, and with all of it the places that it is gone back to."""
        saved = self.saved.get(entry.model)
        if saved is None or entry.kind != TEXT or entry.saved == "all":
            return
        if whole:
            for place in self._places_to_save(entry):
                self._save_place(place, saved)
        elif saved.save(entry.tokens, entry.caches, whole=False):
            entry.saved = "pages"
        else:
            self._idle_from = time.monotonic() + _PAUSE

    def _save_next_place(self, entry: KeptText) -> bool:
        """Write states without which a text's pages are of no use; whether there were.

        Only as long as they are no more than half of what is written.
        """
        saved = self.saved[entry.model]
        if entry.waits_for == saved.page_bytes or entry.keeps_all:
            return False
        place = self._places_to_save(entry)[0]
        if saved.tail_bytes + nbytes_behind_pages(place.caches) > saved.page_bytes:
            entry.waits_for = saved.page_bytes
            return False
        self._save_place(place, saved)
        return True

    def _save_place(self, place: KeptText, saved: SavedTexts) -> None:
        if saved.save(place.tokens, place.caches, whole=True):
            place.saved = "all"
        else:
            self._idle_from = time.monotonic() + _PAUSE

    def _places_to_save(self, entry: KeptText) -> list[KeptText]:
        likely = likely_places(entry, self._index.beginnings(entry.model, entry.tokens))
        return [place for place in likely if place.saved != "all"]

"""`TextWriter`: when a store's texts go to a folder.

Owns what is written, and when: pages soon, once; what lies behind a text's last page,
and states at a place of it, as long as they are few beside the pages, and all of the
text that was used last at the end. Which texts are kept is ``prompt_store.py``'s, what
records are ``saved_texts.py``'s.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.nn as nn

from ..conversations import PrefixIndex
from ..conversations.disk import DiskFolder
from .kept_places import likely_places
from .kept_text import TEXT, KeptText
from .saved_texts import SavedTexts
from .sharing import nbytes_behind_pages

#: Seconds without use after which a text's pages are written; and what is behind them,
#: which the next turn would make needless, where pages alone can be gone on from.
PAGES_AFTER, TAIL_AFTER = 2.0, 300.0
#: The former where there is no time: so that not all is lost of a server that always
#: has something to do; and bytes that are written of it at once.
BUSY_AFTER, BUSY_BYTES = 60.0, 8 << 20
#: Bytes behind pages, to those of the pages: where these can be gone on from without,
#: and where they are of no use without.
TAIL_SHARE, STATES_SHARE = 0.1, 1.0
#: Seconds until a folder that did not take a text is asked again.
_PAUSE = 60.0


def _never() -> bool:
    return False


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

    def open(
        self, model: Any, networks: Sequence[nn.Module], caches: Sequence[Any]
    ) -> None:
        """As `PromptStore.open`."""
        if self._folder is not None and model not in self.saved:
            self.saved[model] = SavedTexts(self._folder, networks, caches)

    def idle(
        self, kept: Iterable[KeptText], is_wanted: Callable[[], bool] = _never
    ) -> None:
        """Write something that nobody has used for a while, the last used first.

        Args:
            kept: All that is kept.
            is_wanted: Whether somebody waits: the next pages are left for later then.
        """
        self._write_one(kept, PAGES_AFTER, is_wanted)

    def busy(self, kept: Iterable[KeptText]) -> None:
        """Write a little of what nobody has used for long, for callers without time."""
        before = sum(one.page_bytes for one in self.saved.values())

        def is_enough() -> bool:
            now = sum(one.page_bytes for one in self.saved.values())
            return now - before >= BUSY_BYTES

        self._write_one(kept, BUSY_AFTER, is_enough)

    def _write_one(
        self, kept: Iterable[KeptText], after: float, is_wanted: Callable[[], bool]
    ) -> None:
        now = time.monotonic()
        for entry in self._unsaved(kept):
            idle = now - entry.at
            if idle <= after:
                continue
            if not entry.saved:
                self._save_pages(entry, is_wanted)
                return
            is_late = idle > TAIL_AFTER or not entry.keeps_all
            if is_late and self._save_next_place(entry):
                return

    def write(self, kept: Iterable[KeptText]) -> None:
        """Write what `idle` would, of all texts at once."""
        for entry in self._unsaved(kept):
            if not entry.saved:
                self._save_pages(entry)
            if not entry.keeps_all:
                self._save_places(entry)

    def save_next(self, kept: Iterable[KeptText]) -> None:
        """Write a text of those not yet written, the one that was used last."""
        for entry in self._unsaved(kept):
            if not entry.saved:
                self._save_pages(entry)
                return
            if self._save_next_place(entry):
                return

    def close(self, kept: Iterable[KeptText], until: float = math.inf) -> None:
        """Write what is not yet written, the last used first, and close the folder.

        Args:
            kept: All that is kept.
            until: When to begin with no more, `time.monotonic`.
        """
        self._idle_from = 0.0
        unsaved = self._unsaved(kept)
        latest = max((one.used for one in kept if one.kind == TEXT), default=0)
        while unsaved and time.monotonic() < until:
            entry = unsaved.pop(0)
            self.save(entry, whole=entry.used == latest)
        late = [one for one in unsaved if not one.saved]
        if late:
            logging.warning(f"KV folder: no time was left to write {len(late)} texts")
        if self._folder is not None:
            self._folder.close()

    def _unsaved(self, kept: Iterable[KeptText]) -> list[KeptText]:
        """Texts to write, the last used first; none while a folder takes none."""
        if time.monotonic() < self._idle_from:
            return []
        texts = (entry for entry in kept if entry.kind == TEXT)
        found = (one for one in texts if one.saved != "all" and one.model in self.saved)
        return sorted(found, key=lambda entry: -entry.used)

    def save(self, entry: KeptText, whole: bool = False) -> None:
        """Write a text, and places that it is gone back to.

        Args:
            entry: The text.
            whole: All of these; else those that are few beside pages.
        """
        if entry.model not in self.saved or entry.kind != TEXT:
            return
        if not entry.saved:
            self._save_pages(entry)
        if entry.saved == "pages":
            self._save_places(entry, whole)

    def _save_pages(
        self, entry: KeptText, is_wanted: Callable[[], bool] = _never
    ) -> None:
        saved, given_up = self.saved[entry.model], False

        def asked() -> bool:
            nonlocal given_up
            given_up = is_wanted()
            return given_up

        if saved.save(entry.tokens, entry.caches, whole=False, is_wanted=asked):
            entry.saved = "pages"
        elif not given_up:
            self._idle_from = time.monotonic() + _PAUSE

    def _save_places(self, entry: KeptText, whole: bool = False) -> None:
        while self._save_next_place(entry, whole):
            pass

    def _save_next_place(self, entry: KeptText, whole: bool = False) -> bool:
        """Write what is behind a text's pages, or states at a place; whether any was.

        Args:
            entry: The text, whose pages are written.
            whole: Also if that is too much beside these.
        """
        saved = self.saved[entry.model]
        waits = entry.waits_for == saved.page_bytes and not whole
        if waits or time.monotonic() < self._idle_from:
            return False  # looking for places takes a while
        likely = likely_places(entry, self._index.beginnings(entry.model, entry.tokens))
        places = [place for place in likely if place.saved != "all"]
        if not places:
            return False
        size = saved.tail_bytes + nbytes_behind_pages(places[0].caches)
        share = TAIL_SHARE if entry.keeps_all else STATES_SHARE
        if size > share * saved.page_bytes and not whole:
            entry.waits_for = saved.page_bytes
            return False
        if not saved.save(places[0].tokens, places[0].caches, whole=True):
            self._idle_from = time.monotonic() + _PAUSE
            return False
        places[0].saved = "all"
        return True

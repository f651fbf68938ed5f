"""`PromptStore`: caches of texts that were read, for those that begin like them.

It stands where mlx-lm's ``LRUPromptCache`` does and answers to the same calls. A new
text gets a fork of the cache that is good for most of it, whoever made that: another
conversation, a living one's prompt, an earlier turn. Caches that keep all tokens are
cut where the texts part; states that stand at one place of their text (recurrent ones,
full windows) are taken from the nearest place before, of which mlx-lm's loop hands over
those that `Generator` asks for. Pages that texts share are held, and counted, once.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import mlx.nn as nn

from ..conversations import BLOCK, PrefixIndex, common_length, spread
from ..conversations.disk import DiskFolder
from ..conversations.index import Tokens, as_tokens
from ..conversations.snapshots import CLOSE
from .kept_places import first_to_go
from .kept_text import PLACE, SYSTEM, TEXT, KeptText
from .loans import Loans
from .sharing import claimed_nbytes, held_nbytes
from .stock import cut_to_common, labelled_leaves
from .text_writer import TextWriter

#: Places of one text at which states are kept.
MAX_PLACES = 16
#: Bytes, or texts, where there is no limit.
UNBOUNDED = 1 << 63


class PromptStore:
    """Caches by text, least recently used ones dropped first.

    Args:
        max_size: Whole texts to keep.
        max_bytes: Bytes to keep, pages that texts share counted once.
        folder: Where texts go that are idle, and outlive the process.

    Attributes:
        loans: Pages that requests go on from; they count, also when their text is gone.
        expected: Says how many bytes of codes are set aside for requests that run, if
            ``max_bytes`` is what those leave.
    """

    def __init__(
        self,
        max_size: int = 10,
        max_bytes: int = UNBOUNDED,
        folder: DiskFolder | None = None,
    ) -> None:
        self.max_size, self.max_bytes, self.folder = max_size, max_bytes, folder
        self._index: PrefixIndex[KeptText] = PrefixIndex()
        self._writer = TextWriter(folder, self._index)
        self._kept: list[KeptText] = []
        self._clock = itertools.count(1)
        self.loans = Loans()
        self.expected: Callable[[], int] | None = None
        # With which loans, once they are known.
        self._nbytes: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Whole texts that are kept."""
        return sum(entry.kind == TEXT for entry in self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept or lent."""
        version = self.loans.version  # they may end meanwhile, on another thread
        if self._nbytes is None or self._nbytes[1] != version:
            self._nbytes = held_nbytes(self._leaves(), self.loans.tables), version
        return self._nbytes[0]

    def _is_above(self, limit: int) -> bool:
        if self.expected is None:
            return self.nbytes > limit
        lent = self.loans.tables
        return claimed_nbytes(self._leaves(), lent, self.expected()) > limit

    def _leaves(self) -> Iterator[Any]:
        for entry in self._kept:
            yield from (leaf for _, leaf in labelled_leaves(entry.caches))

    def open(
        self, model: Any, networks: Sequence[nn.Module], caches: Sequence[Any]
    ) -> None:
        """Look for a model's texts in the folder, and keep them there, from now on.

        Args:
            model: As texts of it are called.
            networks: The model, and its draft model if it has one.
            caches: Empty caches of theirs.
        """
        self._writer.open(model, networks, caches)

    def in_common(self, model: Any, tokens: Tokens) -> int:
        """The longest beginning that a kept text has in common with this one."""
        return self._index.in_common(model, tokens)

    def in_reach(self, model: Any, tokens: Tokens) -> int:
        """How much of that a fork would have seen."""
        return self._longest(model, tokens)[0]

    def parted(self, model: Any, tokens: Tokens) -> list[int]:
        """Where a text should be kept since one parted there from others.

        It will again, or a little before: a line with the time, say.
        """
        place = self.in_common(model, tokens) - CLOSE
        return [place] if place > self.in_reach(model, tokens) else []

    def lend(self, borrower: Hashable, model: Any, tokens: Tokens) -> int:
        """Hold what a fork would see until ``loans`` end it; it is dropped last.

        Returns:
            Bytes of its pages.
        """
        length, entry = self._longest(model, tokens)
        if entry is None:
            return 0
        self._use(entry)
        return self.loans.lend(borrower, entry.caches, length)

    def _longest(self, model: Any, tokens: Tokens) -> tuple[int, KeptText | None]:
        """What is good for most of a text, whose last token is always read."""
        return self._index.longest(model, tokens[:-1], KeptText.usable)

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """A cache that has seen the beginning of a text, and what it has not seen.

        That is at least the last token, from which an answer goes on.

        Args:
            model: Whose caches.
            tokens: The text.

        Returns:
            A fork, and the rest; None and all of the text if nothing fits.
        """
        text = as_tokens(tokens)
        length, entry = self._longest(model, text)
        saved = self._writer.saved.get(model)
        restored = saved.load(text[:-1], length + BLOCK) if saved else None
        if restored is not None:
            entry = KeptText(model, *restored, saved="all")
            self._insert(entry)
            length = entry.usable(common_length(entry.tokens, text[:-1]))
        self._tell(model, text, length)
        if entry is None:
            return None, tokens
        self._use(entry)
        return entry.fork(length), tokens[length:]

    def _tell(self, model: Any, text: Tokens, length: int) -> None:
        """Say so if states that cannot go back are why tokens are read again."""
        common = self.in_common(model, text[:-1])
        if common > length + CLOSE:
            logging.info(
                f"Prompt cache: {common} tokens were read before, but recurrent states "
                f"or windows cannot go back to where the texts part; {common - length} "
                f"of them are read again, from token {length} on"
            )

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = TEXT,
    ) -> None:
        """Keep a text's cache, or nothing if its layers differ and cannot be cut.

        Speculative decoding ends with caches that have not seen the last token, or of
        two models that have seen different numbers: what all have seen is kept.

        Args:
            model: Whose caches.
            tokens: The text.
            prompt_cache: Its cache, the store's from now on.
            cache_type: As `KeptText.kind`.
        """
        seen = cut_to_common(prompt_cache, len(tokens))
        if seen:
            kept = KeptText(model, as_tokens(tokens[:seen]), prompt_cache, cache_type)
            self._insert(kept)

    def _use(self, entry: KeptText) -> None:
        entry.at, now = time.monotonic(), next(self._clock)
        for one in [entry, *self._beginnings(entry)]:
            one.used = now

    def _insert(self, kept: KeptText) -> None:
        self._use(kept)
        replaced = self._index.add(kept.model, kept.tokens, kept)
        if replaced is not None:
            self._kept.remove(replaced)
            if replaced.kind == TEXT:
                kept.kind = TEXT
        self._kept.append(kept)
        self._nbytes = None
        self._drop_beginnings(kept)
        self.trim_to(n_sequences=self.max_size, n_bytes=self.max_bytes)

    def _drop_beginnings(self, kept: KeptText) -> None:
        """Give up what this text makes needless of those that it goes on from."""
        beginnings = self._beginnings(kept)
        if kept.keeps_all:
            for entry in beginnings:
                self._drop(entry)
            return
        for entry in beginnings:
            if kept.kind == entry.kind == TEXT:
                entry.kind = PLACE
        by_length = {
            len(entry.tokens): entry
            for entry in [*beginnings, kept]
            if entry.kind != SYSTEM or entry is kept
        }
        for length in spread(list(by_length), MAX_PLACES):
            self._drop(by_length[length])

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Drop what was not used for longest, until no more is kept than this.

        Args:
            n_sequences: Whole texts; places within them are a few for each.
            n_bytes: Bytes, those that requests have set aside not among them.
        """
        texts = UNBOUNDED if n_sequences is None else max(0, n_sequences)
        size = UNBOUNDED if n_bytes is None else max(0, n_bytes)
        while len(self) > texts:
            self._drop_oldest(lambda entry: entry.kind == TEXT)
        while len(self._kept) - len(self) > MAX_PLACES * texts:
            self._drop_oldest(lambda entry: entry.kind != TEXT)
        while self._kept and size < UNBOUNDED and self._is_above(size):
            self._let_go(first_to_go(self._kept, self._beginnings))

    def _drop_oldest(self, among: Callable[[KeptText], bool]) -> None:
        some = [entry for entry in self._kept if among(entry)]
        self._let_go(min(some, key=lambda entry: entry.used))

    def _let_go(self, entry: KeptText) -> None:
        self._writer.save(entry)
        self._drop(entry)

    def _drop(self, entry: KeptText) -> None:
        self._index.remove(entry.model, entry.tokens)
        self._kept.remove(entry)
        self._nbytes = None

    def give_up(self, model: Any, tokens: list[int]) -> None:
        """Drop a text that another takes the place of, unwritten; its places stay."""
        text = as_tokens(tokens)
        for entry in list(self._kept):
            if entry.kind != TEXT or entry.model != model:
                continue
            if len(entry.tokens) == len(text) == common_length(entry.tokens, text):
                self._drop(entry)

    def forget(self) -> None:
        """Drop all that is kept; nothing of it is written any more."""
        for entry in list(self._kept):
            self._drop(entry)

    def idle(self, is_wanted: Callable[[], bool] = lambda: False) -> None:
        """Write a text that nobody has used for a while, for callers with time.

        Args:
            is_wanted: Whether there is none left: what is not written is, later.
        """
        self._writer.idle(self._kept, is_wanted)

    def busy(self) -> None:
        """Write a little of what nobody has used for long, for callers without time."""
        self._writer.busy(self._kept)

    def write(self) -> None:
        """Write what is new, for callers with no time of their own for `idle`."""
        self._writer.write(self._kept)

    def save_next(self) -> None:
        """Write a text of those not yet written, the one that was used last."""
        self._writer.save_next(self._kept)

    def _beginnings(self, entry: KeptText) -> list[KeptText]:
        """What is kept of texts that a text goes on from, the shortest first."""
        return self._index.beginnings(entry.model, entry.tokens)

    def close(self, until: float = math.inf) -> None:
        """Write what is not yet written, the last used first and whole.

        Args:
            until: When to begin with no more, `time.monotonic`.
        """
        self._writer.close(self._kept, until)

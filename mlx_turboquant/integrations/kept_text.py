"""`KeptText`: a text whose cache is kept, and what of it another text can go on from.

Owns no more than one; which are kept is `prompt_store`'s.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from ..conversations.index import Tokens
from ..errors import UnsupportedError
from .stock import can_go_back, keeps_all, labelled_leaves

#: Kinds: all of a text, a place in it, and one in a system prompt or in tools.
TEXT, PLACE, SYSTEM = "assistant", "user", "system"


@dataclass(eq=False)
class KeptText:
    """What is kept of one text.

    Attributes:
        model: Whose caches, as mlx-lm names it.
        tokens: The text.
        caches: A prompt cache that has seen all of it.
        kind: ``"assistant"``: all of a text; ``"user"``: a place within one;
            ``"system"``: one that other texts may part from it at.
        used: When it was used last, by the store's own count.
        at: The same in seconds.
        saved: What a folder has of it: nothing, its pages, or all.
        waits_for: Bytes of pages that had been written when its states were too many to
            be written, too; they wait for more.
    """

    model: Any
    tokens: Tokens
    caches: list[Any]
    kind: str = TEXT
    used: int = 0
    at: float = 0.0
    saved: Literal["", "pages", "all"] = ""
    waits_for: int = -1

    @property
    def keeps_all(self) -> bool:
        """Whether it can be cut to any length, as long as it may get."""
        return keeps_all(self.caches)

    def usable(self, common: int) -> int:
        """For how many tokens it is good, of ``common`` that it shares with a text."""
        if len(self.tokens) <= common:
            return len(self.tokens)
        leaves = labelled_leaves(self.caches)
        return common if all(can_go_back(leaf) for _, leaf in leaves) else 0

    def fork(self, length: int) -> list[Any]:
        """A cache of its first ``length`` tokens.

        Raises:
            UnsupportedError: if it is not `usable` for them.
        """
        caches: list[Any] = copy.deepcopy(list(self.caches))
        extra = len(self.tokens) - length
        for label, leaf in labelled_leaves(caches) if extra else ():
            if not can_go_back(leaf) or leaf.trim(extra) != extra:
                raise UnsupportedError(
                    f"cache {label}, a {type(leaf).__name__}, stands at token "
                    f"{len(self.tokens)} and cannot go back to {length}",
                    "read on from a place before",
                )
        return caches

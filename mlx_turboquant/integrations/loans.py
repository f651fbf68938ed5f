"""`Loans`: pages of kept texts that running requests go on from.

A request that forks a kept text holds the same pages as long as it runs, whatever
becomes of the text. Owns which pages those are and what they take, each counted once;
who may borrow is `admission`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from .. import page_table
from ..cache import TurboQuantCache
from ..page_table import PageTable
from .stock import labelled_leaves


class Loans:
    """Pages by who borrows them; loans may end on any thread.

    Attributes:
        version: Another one whenever there are other loans.
    """

    def __init__(self) -> None:
        self._lent: dict[Hashable, list[PageTable]] = {}
        self.version = 0

    def lend(self, borrower: Hashable, caches: Sequence[Any], length: int) -> int:
        """Hold the whole pages of a text's first tokens until the loan ends.

        Windows are not lent: their pages go while a request runs.

        Args:
            borrower: Who goes on from it.
            caches: The text's prompt cache.
            length: Tokens of it that the borrower goes on from.

        Returns:
            Bytes of these pages.
        """
        tables = []
        for _, leaf in labelled_leaves(caches):
            if type(leaf) is TurboQuantCache:
                table = leaf._tokens.table.fork()
                kept = max(0, min(table.length, length - leaf.spec.sink))
                table.drop_last(table.length - kept // leaf.spec.page * leaf.spec.page)
                tables.append(table)
        self._lent[borrower] = tables
        self.version += 1
        return page_table.pages_nbytes(tables)

    def end(self, borrower: Hashable) -> None:
        """A loan is over, if there is one."""
        if self._lent.pop(borrower, None) is not None:
            self.version += 1

    def end_others(self, borrowers: Iterable[Hashable]) -> None:
        """Loans of all but these are over: some end before they have begun."""
        for other in set(self._lent) - set(borrowers):
            self.end(other)

    @property
    def tables(self) -> list[PageTable]:
        """All that is lent."""
        return [table for tables in list(self._lent.values()) for table in tables]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is lent, a page that several borrow once."""
        return page_table.pages_nbytes(self.tables)

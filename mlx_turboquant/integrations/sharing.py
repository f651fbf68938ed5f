"""Bytes of conversations: of several, shared pages once; of one beside its pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import page_table
from ..cache import TurboQuantCache
from ..entries import nbytes_of
from ..page_table import PageTable
from ..pages import PagePool
from .stock import labelled_leaves


def held_nbytes(caches: Iterable[Any], others: Iterable[PageTable] = ()) -> int:
    """Bytes of layers' caches of any kinds, which may be of many conversations.

    A page that several of them hold counts once, also if others hold it, too; what is
    free in their pools counts as theirs. Caches of other classes count what they say of
    themselves.

    Args:
        caches: The caches, no batches of them.
        others: Pages that count, too.
    """
    beside, tables = _apart(caches)
    return beside + page_table.held_nbytes([*tables, *others])


def claimed_nbytes(
    caches: Iterable[Any], lent: Iterable[PageTable], expected: int
) -> int:
    """The same without what is set aside for requests that run already.

    Pages that a request has made are its own, also if a text kept has them as well;
    free ones are where those will be that it is still to make.

    Args:
        caches: Of texts that are kept.
        lent: Pages that requests go on from, which are not set aside for them.
        expected: Bytes of codes that are set aside.
    """
    total, tables = _apart(caches)
    mine: dict[PagePool, npt.NDArray[np.int32]] = {}
    is_lent: dict[PagePool, npt.NDArray[np.bool_]] = {}
    for tables_of, loan in ((tables, False), (list(lent), True)):
        for table in tables_of:
            pool = table.pool
            count = mine.setdefault(pool, np.zeros(pool.capacity, np.int32))
            mask = is_lent.setdefault(pool, np.zeros(pool.capacity, np.bool_))
            for start, stop in table.runs:
                count[start:stop] += 1
                mask[start:stop] |= loan
    free = taken = 0
    for pool, count in mine.items():
        holders, size = pool.all_holders, pool.page_nbytes
        theirs = (holders > count) & ~is_lent[pool]
        total += size * int(np.count_nonzero((count > 0) & ~theirs))
        taken += size * int(np.count_nonzero(theirs))
        free += size * int(np.count_nonzero(holders == 0))
    return total + max(0, free - max(0, expected - taken))


def _apart(caches: Iterable[Any]) -> tuple[int, list[PageTable]]:
    """Bytes beside pages of codes, and the pages."""
    beside, tables = 0, []
    for cache in caches:
        beside += nbytes_of(cache)
        if isinstance(cache, TurboQuantCache):
            table = cache._tokens.table
            beside -= table.nbytes
            tables.append(table)
    return beside, tables


def nbytes_behind_pages(caches: Iterable[Any]) -> int:
    """Bytes of a prompt cache beside the pages of all its tokens."""
    total = 0
    for _, leaf in labelled_leaves(caches):
        total += nbytes_of(leaf)
        if type(leaf) is TurboQuantCache:
            total -= leaf._tokens.table.nbytes
    return total

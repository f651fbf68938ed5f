"""`held_nbytes`: what several conversations hold together, shared pages once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import page_table
from ..cache import TurboQuantCache
from ..entries import nbytes_of
from ..page_table import PageTable


def held_nbytes(caches: Iterable[Any], others: Iterable[PageTable] = ()) -> int:
    """Bytes of layers' caches of any kinds, which may be of many conversations.

    A page that several of them hold counts once, also if others hold it, too; what is
    free in their pools counts as theirs. Caches of other classes count what they say of
    themselves.

    Args:
        caches: The caches, no batches of them.
        others: Pages that count, too.
    """
    total, tables = 0, list(others)
    for cache in caches:
        total += nbytes_of(cache)
        if isinstance(cache, TurboQuantCache):
            table = cache._tokens.table
            total -= table.nbytes
            tables.append(table)
    return total + page_table.held_nbytes(tables)

"""Bytes of conversations: of several, shared pages once; of one beside its pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import page_table
from ..cache import TurboQuantCache
from ..entries import nbytes_of
from ..page_table import PageTable
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
    total, tables = 0, list(others)
    for cache in caches:
        total += nbytes_of(cache)
        if isinstance(cache, TurboQuantCache):
            table = cache._tokens.table
            total -= table.nbytes
            tables.append(table)
    return total + page_table.held_nbytes(tables)


def nbytes_behind_pages(caches: Iterable[Any]) -> int:
    """Bytes of a prompt cache beside the pages of all its tokens."""
    total = 0
    for _, leaf in labelled_leaves(caches):
        total += nbytes_of(leaf)
        if type(leaf) is TurboQuantCache:
            total -= leaf._tokens.table.nbytes
    return total

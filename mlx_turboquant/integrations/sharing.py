"""`held_nbytes`: what several conversations hold together, shared pages once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cache import TurboQuantCache
from ..entries import nbytes_of
from ..pages import PagePool


def held_nbytes(caches: Iterable[Any]) -> int:
    """Bytes of layers' caches of any kinds, which may be of many conversations.

    A page that several of them hold counts once, also if others hold it, too; what is
    free in their pools counts as theirs. Caches of other classes count what they say of
    themselves.

    Args:
        caches: The caches, no batches of them.
    """
    total = 0
    held: dict[PagePool, npt.NDArray[np.bool_]] = {}
    for cache in caches:
        total += nbytes_of(cache)
        if not isinstance(cache, TurboQuantCache):
            continue
        table = cache._tokens.table
        total -= table.nbytes
        pages = held.setdefault(table.pool, np.zeros(table.pool.capacity, np.bool_))
        for start, stop in table.runs:
            pages[start:stop] = True
    for pool, pages in held.items():
        free = pool.capacity - pool.held
        total += (int(np.count_nonzero(pages)) + free) * pool.page_nbytes
    return total

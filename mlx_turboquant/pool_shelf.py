"""`PoolShelf`: where caches of one layer find the pool that they share.

Owns which pools there are; pools are `pages`'.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import Any

from .pages import PagePool


class PoolShelf:
    """The pools of one layer of a model, by what fits their pages and by thread.

    A pool is there as long as a sequence holds pages of it. Threads have pools of their
    own: what MLX has not computed yet belongs to the thread that asked for it.
    """

    def __init__(self) -> None:
        self._pools: weakref.WeakValueDictionary[Hashable, PagePool] = (
            weakref.WeakValueDictionary()
        )

    def pool_for(self, kind: Hashable, page: int) -> PagePool:
        """The pool of pages of a kind, each of so many tokens."""
        key = kind, page, threading.get_ident()
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = PagePool(page)
        return pool

    def __deepcopy__(self, memo: dict[int, Any]) -> PoolShelf:
        """Itself, as a pool."""
        return self

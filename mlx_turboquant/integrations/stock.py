"""What mlx-lm would make for a model, and how to walk any prompt cache.

Imports nothing of the factory: the ``make_cache`` that the factory puts on a model
carries what stood there before as its attribute ``stock``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.nn as nn
import mlx_lm.models.cache as host_cache

#: mlx-lm's cache of all tokens, uncompressed.
StockKVCache = host_cache.KVCache
#: Classes of mlx-lm's that a compressed cache can stand in for.
REPLACEABLE = (host_cache.KVCache, host_cache.RotatingKVCache)
#: First tokens that mlx-lm's ``max_kv_size`` never drops.
BOUNDED_KEEP = 4


def stock_caches(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """What mlx-lm would make for this model if we were not here.

    Args:
        model: A model loaded by mlx-lm.
        max_kv_size: Tokens to keep at most in caches that would keep all. Unlike
            mlx-lm, which ignores it there, models that make their own caches obey.
    """
    make_cache = getattr(model, "make_cache", None)
    make_cache = getattr(make_cache, "stock", make_cache)
    if make_cache is None:
        plain = types.SimpleNamespace(layers=model.layers)
        caches = list(host_cache.make_prompt_cache(plain))
    else:
        caches = list(make_cache())
    return caches if max_kv_size is None else bound(caches, max_kv_size)


def bound(caches: Iterable[Any], max_kv_size: int) -> list[Any]:
    """The caches, with a window of ``max_kv_size`` tokens for every plain one."""

    def bounded(leaf: Any) -> Any:
        if type(leaf) is not StockKVCache:
            return leaf
        return host_cache.RotatingKVCache(max_kv_size, BOUNDED_KEEP)

    return replace_leaves(caches, bounded)


def replace_plain(model: nn.Module, make: Callable[[], Any]) -> list[Any]:
    """The model's stock caches, but what ``make`` makes for every plain `KVCache`."""
    return replace_leaves(
        stock_caches(model), lambda leaf: make() if type(leaf) is StockKVCache else leaf
    )


def labelled_leaves(
    caches: Iterable[Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(label, cache) of the entries of a prompt cache, and of what holds several."""
    for index, entry in enumerate(caches):
        if isinstance(entry, host_cache.CacheList):
            yield from labelled_leaves(entry.caches, f"{prefix}{index}.")
        else:
            yield f"{prefix}{index}", entry


def replace_leaves(caches: Iterable[Any], make: Callable[[Any], Any]) -> list[Any]:
    """What ``make`` makes of every leaf, in the order of `labelled_leaves`."""

    def replace(entry: Any) -> Any:
        if not isinstance(entry, host_cache.CacheList):
            return make(entry)
        # Inside a CacheList itself, since models ask for their entries by its type.
        entry.caches = type(entry.caches)(replace(inner) for inner in entry.caches)
        return entry

    return [replace(entry) for entry in caches]


def length_of(caches: Iterable[Any]) -> int | None:
    """Tokens that a prompt cache has seen; None if none of its entries counts them."""
    offsets = [getattr(leaf, "offset", None) for _, leaf in labelled_leaves(caches)]
    return max((o for o in offsets if isinstance(o, int)), default=None)

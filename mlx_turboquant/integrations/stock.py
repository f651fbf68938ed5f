"""What mlx-lm would make for a model, and how to walk any prompt cache.

For a model of mlx-vlm's it is what that would make, whose classes have the same names.
Imports nothing of the factory: the ``make_cache`` that the factory puts on a model
carries what stood there before as its attribute ``stock``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.nn as nn
import mlx_lm.models.cache as host_cache

from ..errors import SpecError, UnsupportedModelError, shown
from . import vision

#: mlx-lm's cache of all tokens, uncompressed.
StockKVCache = host_cache.KVCache
#: First tokens that mlx-lm's ``max_kv_size`` never drops.
BOUNDED_KEEP = 4
#: MLX counts an axis in 32 bits.
_MOST_TOKENS = 2**31 - 1


def stock_caches(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """What mlx-lm would make for this model if we were not here.

    Args:
        model: A model loaded by mlx-lm or mlx-vlm.
        max_kv_size: Tokens to keep at most in caches that would keep all. Unlike
            mlx-lm, which ignores it there, models that make their own caches obey.

    Raises:
        UnsupportedModelError: as `check_model`.
        SpecError: for another ``max_kv_size``.
    """
    check_model(model)
    model = vision.language_model(model)
    make_cache = getattr(model, "make_cache", None)
    make_cache = getattr(make_cache, "stock", make_cache)
    if make_cache is None:
        plain = types.SimpleNamespace(layers=model.layers)
        is_vision = vision.is_vision_model(model)
        home = (vision.cache_module() if is_vision else None) or host_cache
        caches = list(home.make_prompt_cache(plain))
    else:
        caches = list(make_cache())
    return caches if max_kv_size is None else bound(caches, max_kv_size)


def check_model(model: Any) -> None:
    """Make sure that it is a model, not what a model comes with or is called.

    Raises:
        UnsupportedModelError: if it is not.
    """
    if not callable(getattr(model, "modules", None)):  # what wraps a model has them
        raise UnsupportedModelError(
            f"what is of type {type(model).__name__} is no model",
            "pass the model alone, the first of what tq.load or mlx_lm.load returns",
        )


def bound(caches: Iterable[Any], max_kv_size: int) -> list[Any]:
    """The caches, with a window of ``max_kv_size`` tokens for every plain one.

    Raises:
        SpecError: if that is no number of tokens.
    """
    if type(max_kv_size) is not int or not 1 <= max_kv_size <= _MOST_TOKENS:
        raise SpecError(
            f"max_kv_size {shown(max_kv_size)} is no whole number in 1..{_MOST_TOKENS}"
        )

    def bounded(leaf: Any) -> Any:
        if not is_plain(leaf):
            return leaf
        home: Any = sys.modules[type(leaf).__module__]
        return home.RotatingKVCache(max_kv_size, BOUNDED_KEEP)

    return replace_leaves(caches, bounded)


def is_plain(leaf: Any) -> bool:
    """Whether it is mlx-lm's or mlx-vlm's cache of all tokens, uncompressed."""
    return any(type(leaf) is home.KVCache for home in _cache_modules())


def is_replaceable(leaf: Any) -> bool:
    """Whether a compressed cache can stand in for it; not for what it is derived to."""
    return is_plain(leaf) or any(
        type(leaf) is home.RotatingKVCache for home in _cache_modules()
    )


def _cache_modules() -> tuple[Any, ...]:
    other = vision.cache_module()
    return (host_cache,) if other is None else (host_cache, other)


def _is_list(entry: Any) -> bool:
    """Whether it is an entry that holds several caches."""
    return any(isinstance(entry, home.CacheList) for home in _cache_modules())


def replace_plain(model: nn.Module, make: Callable[[], Any]) -> list[Any]:
    """The model's stock caches, but what ``make`` makes for every plain `KVCache`."""
    return replace_leaves(
        stock_caches(model), lambda leaf: make() if is_plain(leaf) else leaf
    )


def labelled_leaves(
    caches: Iterable[Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(label, cache) of the entries of a prompt cache, and of what holds several."""
    for index, entry in enumerate(caches):
        if _is_list(entry):
            yield from labelled_leaves(entry.caches, f"{prefix}{index}.")
        else:
            yield f"{prefix}{index}", entry


def replace_leaves(caches: Iterable[Any], make: Callable[[Any], Any]) -> list[Any]:
    """What ``make`` makes of every leaf, in the order of `labelled_leaves`."""

    def replace(entry: Any) -> Any:
        if not _is_list(entry):
            return make(entry)
        # Inside a CacheList itself, since models ask for their entries by its type.
        entry.caches = type(entry.caches)(replace(inner) for inner in entry.caches)
        return entry

    return [replace(entry) for entry in caches]


def length_of(caches: Iterable[Any]) -> int | None:
    """Tokens that a prompt cache has seen; None if none of its entries counts them."""
    offsets = [getattr(leaf, "offset", None) for _, leaf in labelled_leaves(caches)]
    return max((o for o in offsets if isinstance(o, int)), default=None)


def keeps_all(caches: Iterable[Any]) -> bool:
    """Whether a prompt cache can be cut to any length, however long its text gets.

    Recurrent states cannot, nor windows and chunks that tokens will leave.
    """
    return all(
        leaf.is_trimmable()
        and not (hasattr(leaf, "max_size") or hasattr(leaf, "chunk_size"))
        for _, leaf in labelled_leaves(caches)
    )


def can_go_back(leaf: Any) -> bool:
    """Whether it can be cut to any length now: nothing has left it yet."""
    return bool(leaf.is_trimmable()) and not getattr(leaf, "start_position", 0)


def cut_to_common(caches: Sequence[Any], most: int) -> int:
    """Cut caches to what all have seen; how many tokens, 0 if they cannot be cut.

    Args:
        caches: A prompt cache.
        most: Tokens of its text.
    """
    lengths = [length_of([entry]) for entry in caches]
    counted = [length for length in lengths if length is not None]
    seen = min([*counted, most])
    if any(length != seen for length in counted):
        if not host_cache.can_trim_prompt_cache(caches):
            return 0
        for entry, length in zip(caches, lengths, strict=True):
            entry.trim((length or seen) - seen)
    return seen

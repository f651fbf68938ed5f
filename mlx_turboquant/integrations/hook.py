"""The attention hook: lets a model's own attention call read compressed caches.

The hook rebinds
``scaled_dot_product_attention`` in the globals of the functions that make up one
model's layers, which is where mlx-lm's models (and a user's own model file) look it up;
mlx-vlm's look up one of its own there. It looks at the type of the keys it is given,
never at the cache, because some models share keys across layers that have no cache.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.base as host_base
import mlx_lm.models.cache as host_cache

from ..attention import attend
from ..cache import (
    BatchTurboQuantCache,
    RotatingTurboQuantCache,
    ScoredTurboQuantCache,
    TurboQuantCache,
)
from ..errors import FormatError
from ..segments import CompressedKV
from . import vision

_HOOKED = "scaled_dot_product_attention"
_CLASSES = (
    TurboQuantCache,
    RotatingTurboQuantCache,
    ScoredTurboQuantCache,
    BatchTurboQuantCache,
)
#: What files call our classes: mlx-lm, which does not know them, fails with this text.
_LABEL = (
    "{}, which mlx_turboquant reads (pip install mlx-tq): mlx_tq.generate, or "
    "tq.load_prompt_cache in Python"
)

#: Globals that look up a hook, and what they looked up before, by id of the globals.
_hooked: dict[int, tuple[dict[str, Any], Callable[..., mx.array]]] = {}


@functools.cache
def attend_or(stock: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An attention function for compressed keys and values too.

    Args:
        stock: mlx-lm's or mlx-vlm's, which gets all others.
    """

    @functools.wraps(stock)
    def attend_or_stock(
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if isinstance(keys, CompressedKV):
            out = attend(queries, keys, values, scale, mask, sinks)
            # A cache chooses gains and bits by the queries of its first page. Attention
            # only reads caches, so the hook hands them over.
            if keys.observer is not None:
                keys.observe_queries(queries, scale)
            return out
        return stock(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)

    return attend_or_stock


def _layer_globals(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Globals of every function of every class that makes up the model."""
    for kind in {type(module) for module in model.modules()}:
        for cls in kind.__mro__:
            for member in vars(cls).values():
                if isinstance(member, types.FunctionType):
                    yield member.__globals__


def register() -> None:
    """Put our cache classes where mlx-lm's ``load_prompt_cache`` looks names up."""
    for cls in _CLASSES:
        setattr(host_cache, cls.__name__, cls)
        setattr(host_cache, _LABEL.format(cls.__name__), cls)


def labelled(caches: Sequence[Any]) -> list[Any]:
    """Caches as mlx-lm's ``save_prompt_cache`` takes them, ours under their labels."""
    return [
        type(_LABEL.format(type(cache).__name__), (), {"state": cache.state})()
        if isinstance(cache, TurboQuantCache)
        else cache
        for cache in caches
    ]


def class_name(label: str) -> str:
    """The name of a class, in what a file calls it."""
    return label.partition(",")[0]


def cache_class(name: str) -> Any:
    """The class of one sequence's caches with this name, ours or mlx-lm's.

    Raises:
        FormatError: if there is none.
    """
    for cls in _CLASSES[:-1]:
        if cls.__name__ == name:
            return cls
    found = getattr(host_cache, name, None)
    is_cache = isinstance(found, type) and issubclass(found, host_cache._BaseCache)
    if not is_cache or name.startswith(("_", "Batch")):
        raise FormatError(f"{name!r} is no class of caches")
    return found


def install(model: nn.Module) -> None:
    """Let this model's attention layers read compressed caches.

    Layers that call something else are not touched: `probe` finds them.
    """
    register()
    stocks = (host_base.scaled_dot_product_attention, vision.attention())
    for scope in _layer_globals(model):
        found = scope.get(_HOOKED)
        if found is not None and found in stocks:
            _hooked[id(scope)] = scope, found
            scope[_HOOKED] = attend_or(found)


def remove() -> None:
    """Undo every `install` and `register`."""
    for scope, stock in _hooked.values():
        scope[_HOOKED] = stock
    _hooked.clear()
    for cls in _CLASSES:
        for name in (cls.__name__, _LABEL.format(cls.__name__)):
            if getattr(host_cache, name, None) is cls:
                delattr(host_cache, name)

"""The cache factory: compressed caches for every loop of mlx-lm.

Owns which of a model's stock caches are replaced by what, and `apply` and `uninstall`.
Importing it changes nothing in mlx-lm. How attention reads the caches is `hook`'s, what
each layer can take is `probe`'s, files are `prompt_files`'.
"""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.nn as nn
import mlx_lm.models.cache as host_cache

from ..cache import LayerSlot, RotatingTurboQuantCache, TurboQuantCache, min_window
from ..errors import UnsupportedModelError
from ..explanation import Explanation, explain
from ..spec import CacheSpec
from . import hook
from .layers import Parsed, Specs, of_layers, parsed
from .probe import MakeSlot, Slot, probe

KVCache = host_cache.KVCache
_KEPT = 4  # first tokens that mlx-lm's --max-kv-size keeps
_REPLACED = (KVCache, host_cache.RotatingKVCache)

_applied: list[weakref.ref[nn.Module]] = []
_probed: dict[int, tuple[weakref.ref[nn.Module], list[Slot]]] = {}


class _Maker:
    """The ``make_cache`` that `apply` puts on a model instance."""

    def __init__(
        self, model: nn.Module, spec: Parsed, max_kv_size: int | None = None
    ) -> None:
        self._model = weakref.ref(model)
        self.spec, self.max_kv_size = spec, max_kv_size

    def __call__(self) -> list[Any]:
        model = self._model()
        assert model is not None, "the model owns this object"
        return _make(model, self.spec, self.max_kv_size)


def apply(
    model: nn.Module, spec: Specs = "k3v3", max_kv_size: int | None = None
) -> Explanation:
    """Make compressed caches this model's own, for every loop of mlx-lm.

    Sets ``model.make_cache`` on the instance, so ``generate``, ``stream_generate``,
    ``batch_generate``, the server, chat and ``evaluate`` get them unasked. Layers
    that keep their stock cache, or decode all of it at each step, are listed in the
    result and in a warning.

    Args:
        model: A model loaded by mlx-lm.
        spec: A `CacheSpec` or its text, such as ``"k4v3"``; or a list of them, one for
            each layer that can take one.
        max_kv_size: Tokens to keep at most in layers that would keep all: the first 4
            and the latest.

    Raises:
        UnsupportedModelError: if no layer can take the cache.
        SpecError: if a list of specs has another length.
    """
    read = parsed(spec)
    explanation = explain(make_prompt_cache(model, read, max_kv_size))
    model.make_cache = _Maker(model, read, max_kv_size)
    _applied.append(weakref.ref(model))
    return explanation


def uninstall() -> None:
    """Undo every hook, every `apply` and the registered class names."""
    hook.remove()
    for ref in _applied:
        model = ref()
        if model is not None and isinstance(getattr(model, "make_cache", None), _Maker):
            del model.make_cache
    _applied.clear()
    _probed.clear()


def make_prompt_cache(
    model: nn.Module, spec: Specs = "k3v3", max_kv_size: int | None = None
) -> list[Any]:
    """A prompt cache for mlx-lm's ``prompt_cache=``, one entry per layer.

    Every ``KVCache`` the model asks for becomes a `TurboQuantCache`, every
    ``RotatingKVCache`` that is long enough a `RotatingTurboQuantCache`; other kinds are
    left alone, with a warning that names them.

    Args:
        model: A model loaded by mlx-lm.
        spec: A `CacheSpec` or its text, such as ``"k4v3"``; or a list of them, one for
            each layer that can take one.
        max_kv_size: Tokens to keep at most in layers that would keep all: the first 4
            and the latest.

    Raises:
        UnsupportedModelError: if no layer can take the cache.
        SpecError: if a list of specs has another length.
    """
    caches = _make(model, parsed(spec), max_kv_size)
    explanation = explain(caches)
    total = len(explanation.layers)
    left = explanation.left_alone
    if left:
        kinds = sorted({f"{row.cache} ({row.reason})" for row in left})
        warnings.warn(
            f"{len(left)} of {total} caches stay in the model's dtype: "
            f"{', '.join(kinds)}",
            stacklevel=2,
        )
    decoding = sum(row.returns_arrays for row in explanation.layers)
    if decoding:
        warnings.warn(
            f"{decoding} of {total} caches are decoded whole at each step, because "
            f"{_model_type(model)} computes attention itself: they save memory, not "
            "time",
            stacklevel=2,
        )
    return caches


def _make(model: nn.Module, spec: Parsed, max_kv_size: int | None) -> list[Any]:
    stock = stock_caches(model, max_kv_size)
    slots = iter(slots_of(model))
    any_spec = spec if isinstance(spec, CacheSpec) else spec[0]
    places = [
        (entry, slot)
        for entry in leaves(stock)
        if type(entry) in _REPLACED and _fits(entry, slot := next(slots), any_spec)
    ]
    if not places:
        kinds = sorted({_told(entry) for entry in leaves(stock)})
        raise UnsupportedModelError(
            f"none of the {len(stock)} caches of {_model_type(model)} can be "
            f"compressed (they are: {', '.join(kinds)})",
            "run it with an uncompressed cache (leave --kv-bits out)",
        )
    specs, allocation = of_layers(spec, len(places))
    made = {
        id(entry): _compressed(
            entry, slot, own, LayerSlot(allocation, i) if allocation else None
        )
        for i, ((entry, slot), own) in enumerate(zip(places, specs, strict=True))
    }
    hook.install(model)
    return [_replace(entry, lambda leaf: made.get(id(leaf), leaf)) for entry in stock]


def _fits(entry: Any, slot: Slot, spec: CacheSpec) -> bool:
    """Whether the entry can be compressed; if not, it says why to `explain`."""
    if slot.stock:
        entry.left_alone = slot.stock
    elif type(entry) is not KVCache and entry.max_size < min_window(spec):
        entry.left_alone = (
            f"its window of {entry.max_size} tokens is too short for "
            f"{min_window(spec)}: sink, window and two pages"
        )
    return not hasattr(entry, "left_alone")


def _compressed(
    entry: Any, slot: Slot, spec: CacheSpec, seat: LayerSlot | None
) -> TurboQuantCache:
    if type(entry) is KVCache:
        return TurboQuantCache(spec, seat, slot.returns_arrays)
    return RotatingTurboQuantCache(
        spec, entry.max_size, entry.keep, seat, slot.returns_arrays
    )


def slots_of(model: nn.Module) -> list[Slot]:
    """What each replaceable entry of the model's caches can be; probed once.

    Again for a model that was split over machines since: it has fewer entries then.
    """
    count = sum(type(leaf) in _REPLACED for leaf in leaves(stock_caches(model)))
    known = _probed.get(id(model))
    if known is not None and known[0]() is model and len(known[1]) == count:
        return known[1]
    hook.install(model)

    def build(make: MakeSlot) -> list[Any]:
        indices = iter(range(count))

        def ask(leaf: Any) -> Any:
            if type(leaf) not in _REPLACED:
                return leaf
            made = make(next(indices))
            return leaf if made is None else made

        return [_replace(entry, ask) for entry in stock_caches(model)]

    slots = probe(model, build, count)
    _probed[id(model)] = (weakref.ref(model), slots)
    return slots


def stock_caches(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """What mlx-lm would make for this model if we were not here.

    But ``max_kv_size`` bounds the plain caches of every model, also of one that makes
    its own, where mlx-lm ignores it.
    """
    maker = getattr(model, "make_cache", None)
    if isinstance(maker, _Maker):
        maker = getattr(type(model), "make_cache", None)
        maker = maker and functools.partial(maker, model)
    if maker is None:
        plain = types.SimpleNamespace(layers=model.layers)
        return list(host_cache.make_prompt_cache(plain, max_kv_size))
    caches = list(maker())
    if max_kv_size is None:
        return caches

    def bounded(leaf: Any) -> Any:
        if type(leaf) is not KVCache:
            return leaf
        return host_cache.RotatingKVCache(max_kv_size, _KEPT)

    return [_replace(entry, bounded) for entry in caches]


def caches_for(
    model: nn.Module, spec: CacheSpec | None, max_kv_size: int | None = None
) -> list[Any]:
    """`make_prompt_cache` of a spec, `stock_caches` without one."""
    if spec is None:
        return stock_caches(model, max_kv_size)
    return make_prompt_cache(model, spec, max_kv_size)


def replace_plain(model: nn.Module, make: Callable[[], Any]) -> list[Any]:
    """The model's stock caches, but what ``make`` makes for every plain `KVCache`."""
    return [
        _replace(entry, lambda leaf: make() if type(leaf) is KVCache else leaf)
        for entry in stock_caches(model)
    ]


def slots_or_none(model: nn.Module) -> list[Slot | None]:
    """`slots_of` for every leaf of the caches; None where none is replaceable."""
    caches = stock_caches(model)
    try:
        slots = iter(slots_of(model))
    except UnsupportedModelError:
        return [None for _ in leaves(caches)]
    return [next(slots) if type(c) in _REPLACED else None for c in leaves(caches)]


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
    """The entries of a prompt cache, and of what holds several."""
    for entry in caches:
        inner = getattr(entry, "caches", None)
        if inner is None:
            yield entry
        else:
            yield from leaves(inner)


def length_of(caches: Iterable[Any]) -> int | None:
    """Tokens that a prompt cache has seen; None if none of its entries counts them."""
    offsets = [getattr(leaf, "offset", None) for leaf in leaves(caches)]
    return max((o for o in offsets if isinstance(o, int)), default=None)


def _replace(entry: Any, make: Callable[[Any], Any]) -> Any:
    """What ``make`` makes of an entry, or of every leaf of a `CacheList`."""
    if not isinstance(entry, host_cache.CacheList):
        return make(entry)
    entry.caches = type(entry.caches)(_replace(e, make) for e in entry.caches)
    return entry


def _told(entry: Any) -> str:
    name = type(entry).__name__
    return f"{name}, {entry.left_alone}" if hasattr(entry, "left_alone") else name


def _model_type(model: nn.Module) -> str:
    args = getattr(model, "args", None)
    name = getattr(model, "model_type", None) or getattr(args, "model_type", None)
    return str(name or type(model).__name__)

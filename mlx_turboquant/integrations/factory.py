"""The cache factory: compressed caches for every loop of mlx-lm and mlx-vlm.

Makes a model's caches from the records of its dry run (`probe`), and puts the making on
the model (`apply`) or takes it off again (`uninstall`). Importing it changes nothing in
either.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from ..backends import select
from ..cache import (
    BitAllocator,
    LayerSlot,
    RotatingTurboQuantCache,
    ScoredTurboQuantCache,
    TurboQuantCache,
)
from ..entries import CacheEntry, PromptCache
from ..errors import SpecError, UnsupportedModelError
from ..explanation import Explanation, explain
from ..pool_shelf import PoolShelf
from ..spec import CacheSpec
from . import hook, probe, proofs, vision
from .compiled_step import itself
from .stock import (
    BOUNDED_KEEP,
    bound,
    labelled_leaves,
    replace_leaves,
    stock_caches,
)

#: What users may give: one spec for all layers, or one for each.
SpecLike = CacheSpec | str | float | Sequence[CacheSpec | str | float]

_applied: list[weakref.ref[nn.Module]] = []


class _CompressedMaker:
    """The ``make_cache`` that `apply` puts on an instance.

    The caches that it makes have their pages in common, layer by layer.

    Args:
        owner: The instance: the model, or its language model.
        model: The model.
        spec: What the layers store.
        max_kv_size: As for `make_prompt_cache`.
    """

    def __init__(
        self,
        owner: nn.Module,
        model: nn.Module,
        spec: CacheSpec | list[CacheSpec],
        max_kv_size: int | None,
    ) -> None:
        self._owner, self._model = weakref.ref(owner), weakref.ref(model)
        self._spec, self._max_kv_size = spec, max_kv_size
        self._shelves: dict[int, PoolShelf] = {}
        replaced = vars(owner).get("make_cache")
        if isinstance(replaced, _CompressedMaker):
            replaced = replaced.replaced
        self.replaced: Callable[[], list[Any]] | None = replaced

    @property
    def stock(self) -> Callable[[], list[Any]] | None:
        """The owner's ``make_cache`` without this one; None if it has none."""
        owner = self._owner()
        method = getattr(type(owner), "make_cache", None)
        return self.replaced or (method and functools.partial(method, owner))

    def __call__(self) -> PromptCache:
        model = self._model()
        if model is None:  # a language model can outlive the rest
            model = self._owner()
        assert model is not None, "the owner owns this object"
        caches = _make(model, self._spec, self._max_kv_size)
        for layer, (_, leaf) in enumerate(labelled_leaves(caches)):
            if isinstance(leaf, TurboQuantCache):
                leaf.share_pages(self._shelves.setdefault(layer, PoolShelf()))
        return caches


def apply(
    model: nn.Module, spec: SpecLike = "k3v3", max_kv_size: int | None = None
) -> Explanation:
    """Make compressed caches this model's own, for every loop of mlx-lm.

    Sets ``model.make_cache`` on the instance, so ``generate``, ``stream_generate``,
    ``batch_generate``, the server, chat and ``evaluate`` get them unasked; of a model
    of mlx-vlm's on its language model, where mlx-vlm looks for it. Arguments, warnings
    and errors are those of `make_prompt_cache`.

    Returns:
        What every layer will store, and why not where it stores no codes.
    """
    model, specs = itself(model), parse_specs(spec)
    caches = _make_and_warn(model, specs, max_kv_size)
    owner = vision.language_model(model)
    owner.make_cache = _CompressedMaker(owner, model, specs, max_kv_size)
    _applied.append(weakref.ref(owner))
    return explain(caches)


def uninstall() -> None:
    """Undo every hook, every `apply` and the registered class names."""
    hook.remove()
    probe.forget()
    for ref in _applied:
        model = ref()
        maker = vars(model).get("make_cache") if model is not None else None
        if model is None or not isinstance(maker, _CompressedMaker):
            continue
        del model.make_cache
        if maker.replaced is not None:
            model.make_cache = maker.replaced
    _applied.clear()


def make_prompt_cache(
    model: nn.Module, spec: SpecLike = "k3v3", max_kv_size: int | None = None
) -> PromptCache:
    """A prompt cache for ``prompt_cache=`` of mlx-lm and mlx-vlm, an entry per layer.

    Every ``KVCache`` the model asks for becomes a `TurboQuantCache`, every
    ``RotatingKVCache`` that is long enough a `RotatingTurboQuantCache`; other kinds are
    left alone, with a warning that names them. Another warning tells of layers that
    have to decode their whole cache at each step.

    Args:
        model: A model loaded by mlx-lm or mlx-vlm.
        spec: A `CacheSpec` or its text, such as ``"k4v3"``; or a list of them, one for
            each layer that can take one.
        max_kv_size: Tokens to keep at most in layers that would keep all: the first 4
            and the latest.

    Raises:
        UnsupportedModelError: if no layer can take the cache.
        SpecError: if a list of specs has another length.
    """
    return _make_and_warn(itself(model), parse_specs(spec), max_kv_size)


def caches_for(
    model: nn.Module, spec: SpecLike | None, max_kv_size: int | None = None
) -> list[Any]:
    """`make_prompt_cache` of a spec, `stock_caches` without one."""
    if spec is None:
        return stock_caches(model, max_kv_size)
    return _make_and_warn(itself(model), parse_specs(spec), max_kv_size)


def parse_specs(spec: SpecLike) -> CacheSpec | list[CacheSpec]:
    """A spec, or a list of them, read.

    Raises:
        SpecError: if one cannot be read, or the list is empty.
    """
    if isinstance(spec, str | CacheSpec) or not isinstance(spec, Sequence):
        return CacheSpec.parse(spec)
    if not spec:
        raise SpecError("an empty list of specs; give one for each layer, or one spec")
    return [CacheSpec.parse(one) for one in spec]


def specs_per_layer(
    spec: CacheSpec | list[CacheSpec], entries: Sequence[CacheEntry]
) -> list[tuple[CacheSpec, LayerSlot | None]]:
    """What each entry stores, and its place where bits are shared out.

    Raises:
        SpecError: if there are more or fewer specs than layers.
    """
    count = len(entries)
    if isinstance(spec, list):
        if len(spec) != count:
            raise SpecError(
                f"{len(spec)} specs do not fit {count} layers; give each one"
            )
        return [(one, None) for one in spec]
    if not spec.adaptive:
        return [(spec, None)] * count
    allocator = BitAllocator(spec, [entry.shape for entry in entries])
    return [(spec, LayerSlot(allocator, layer)) for layer in range(count)]


def _make_and_warn(
    model: nn.Module, spec: CacheSpec | list[CacheSpec], max_kv_size: int | None
) -> PromptCache:
    caches = _make(model, spec, max_kv_size)
    total = len(caches.entries)
    stock = [entry for entry in caches.entries if not entry.is_compressed]
    # The line to point at called `apply`, `make_prompt_cache` or `caches_for`.
    users_line = 3
    if stock:
        kinds = sorted({f"{entry.kind} ({entry.reason})" for entry in stock})
        warnings.warn(
            f"{len(stock)} of {total} caches stay in the model's dtype: "
            f"{', '.join(kinds)}",
            stacklevel=users_line,
        )
    decoded = sum(entry.decision == "returns_arrays" for entry in caches.entries)
    if decoded:
        warnings.warn(
            f"{decoded} of {total} caches are decoded whole at each step, because "
            f"{_model_type(model)} computes attention itself: they save memory, not "
            "time",
            stacklevel=users_line,
        )
    return caches


def _make(
    model: nn.Module, spec: CacheSpec | list[CacheSpec], max_kv_size: int | None
) -> PromptCache:
    select.table()  # a bad MLX_TQ_BACKEND is said now, not when the first page is full
    stock = stock_caches(model)
    entries = probe.entries_of(model, stock)
    if max_kv_size is not None:
        stock = bound(stock, max_kv_size)
        entries = [entry.bounded(max_kv_size, BOUNDED_KEEP) for entry in entries]
    any_spec = spec[0] if isinstance(spec, list) else spec
    _check_eviction(spec if isinstance(spec, list) else [spec], max_kv_size)
    entries = [entry.under(any_spec) for entry in entries]
    chosen = [entry for entry in entries if entry.is_compressed]
    if any_spec.evict == "score":
        _check_all_score(entries)
    if not chosen:
        kinds = sorted({f"{entry.kind} ({entry.reason})" for entry in entries})
        raise UnsupportedModelError(
            f"none of the {len(stock)} caches of {_model_type(model)} can be "
            f"compressed: {', '.join(kinds)}",
            "run it with an uncompressed cache (leave --kv-bits out)",
        )
    records, specs = iter(entries), iter(specs_per_layer(spec, chosen))
    is_vision = vision.is_vision_model(model)

    def compressed(leaf: Any) -> Any:
        entry = next(records)
        if not entry.is_compressed:
            return leaf
        return _compressed(entry, *next(specs), sees_kept=is_vision)

    caches = PromptCache(replace_leaves(stock, compressed), entries)
    proofs.begin(model, caches, entries)
    if is_vision:
        caches.unsaved = "the positions of images stay with the model of mlx-vlm's"
    return caches


def _check_eviction(specs: Sequence[CacheSpec], max_kv_size: int | None) -> None:
    evicts = {spec.evict for spec in specs}
    if len(evicts) > 1:
        raise SpecError(
            "some layers have evict=score and some not, so they would not show equally "
            "many tokens; say the same for all"
        )
    if max_kv_size is None and evicts == {"score"}:
        raise SpecError(
            "evict=score says what a limit on tokens drops, and there is none; give "
            "max_kv_size (--max-kv-size), or leave evict out"
        )


def _check_all_score(entries: Sequence[CacheEntry]) -> None:
    """What stays mlx-lm's under a limit drops its oldest tokens: others than ours."""
    for entry in entries:
        if entry.is_bounded and not entry.is_compressed:
            raise UnsupportedModelError(
                f"evict=score needs all layers compressed, and cache {entry.label} "
                f"stays {entry.kind} ({entry.reason})",
                "leave evict out, and --max-kv-size drops the oldest tokens",
            )


def _compressed(
    entry: CacheEntry, spec: CacheSpec, slot: LayerSlot | None, sees_kept: bool
) -> TurboQuantCache:
    returns_arrays = entry.decision == "returns_arrays"
    if entry.sliding_window is None:
        return TurboQuantCache(spec, slot, returns_arrays)
    if entry.is_bounded and spec.evict == "score":
        if returns_arrays:
            raise UnsupportedModelError(
                "evict=score goes by queries, and this model keeps them to itself",
                "leave evict out, and --max-kv-size drops the oldest tokens",
            )
        return ScoredTurboQuantCache(spec, entry.sliding_window, entry.keep, slot)
    return RotatingTurboQuantCache(
        spec, entry.sliding_window, entry.keep, slot, returns_arrays, sees_kept
    )


def _model_type(model: nn.Module) -> str:
    holders = (model, getattr(model, "args", None), getattr(model, "config", None))
    names = (getattr(holder, "model_type", None) for holder in holders)
    return str(next(filter(None, names), type(model).__name__))

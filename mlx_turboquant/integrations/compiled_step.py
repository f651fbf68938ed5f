"""`CompiledModel`: decode steps of one stream, replayed instead of built anew.

Building a step's graph costs the host more than small models cost a GPU. Between two
pages all steps are one graph, so it is traced once a page by ``mx.compile``:

    a step that packs a page, the first step behind a prompt    as the model is
    the next step                                               traced
    further steps of the page                                   replayed

Prompts run as they are. So do steps of batches, of texts that have no page yet, and of
models that cannot be traced, and it says why. What a trace sees of a cache is
``cache/traced.py``'s.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..backends import select
from ..backends.gpu import Gpu
from ..backends.traced import EAGER
from ..cache import TurboQuantCache, traced
from ..entries import PromptCache
from ..errors import UnsupportedError, UnsupportedModelError
from . import vision
from .stock import check_model

#: Numbers that are made at once, for as many steps.
_BLOCK = 256


def compiled(model: nn.Module) -> nn.Module | CompiledModel:
    """The model with decode steps that are replayed, for one stream at a time.

    Give it to mlx-lm in the model's place. Worth it where the host is what a step waits
    for: small models on a GPU. Weights are read when a page is traced, so load adapters
    before.

    Args:
        model: A model of mlx-lm's.

    Returns:
        A `CompiledModel`, or the model itself where no GPU backend serves caches and
        nothing could be gained.

    Raises:
        UnsupportedModelError: for a model of mlx-vlm's, whose loop gives its language
            model more than tokens; or if it is no model.

    >>> model, tokenizer = tq.load("mlx-community/Llama-3.2-1B-Instruct-4bit")
    >>> tq.apply(model, "k4v3")
    >>> generate(tq.compiled(model), tokenizer, "hello")
    """
    check_model(model)
    if isinstance(model, CompiledModel):
        return model
    if vision.is_vision_model(model):
        raise UnsupportedModelError(
            "steps of mlx-vlm's models are not compiled: positions come with them",
            "give its loop the model itself",
        )
    first = next(backend for backend, off in select.table() if not off)
    return CompiledModel(model) if isinstance(first, Gpu) else model


def itself(model: Any) -> nn.Module:
    """The model that a `CompiledModel` wraps, or the model."""
    return model._model if isinstance(model, CompiledModel) else cast(nn.Module, model)


class CompiledModel:
    """A model whose decode steps are replayed where they can be.

    Its attributes are the model's, but these.

    Args:
        model: A model of mlx-lm's.

    Attributes:
        uncompiled: Why the latest steps were taken as the model is; "" if there is
            nothing to say. `explain` repeats it for the cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self.uncompiled = ""
        self._model = model
        self._failure = ""
        self._page: _Page | None = None
        self._watch: weakref.ref[TurboQuantCache] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: mx.array, *args: Any, **options: Any) -> Any:
        """What the model returns."""
        page, caches = self._page, options.get("cache")
        is_step = inputs.shape == (1, 1) and not args and list(options) == ["cache"]
        if page is not None and is_step and caches and page.may_step(caches):
            try:
                return page(inputs, caches)
            except Exception as error:  # whatever a model's code makes of stand-ins
                self._failure = _reason_of(error)
        elif not is_step:
            # A prompt is a new start: what failed may have been one step's bad luck.
            self._failure = ""
        # A page refers to codes: it goes before the model may make new ones.
        page = self._page = None
        out = self._model(inputs, *args, **options)
        if caches and is_step:
            reasons = (traced.refusal(cache) for cache in caches)
            prepared = None
            reason = self._failure or next(filter(None, reasons), "")
            if not reason:
                prepared = traced.prepared_of(caches)
                reason = "" if prepared else "no page is packed yet"
            self._note(caches, reason)
            if prepared is not None:
                self._start_page(caches, prepared, out)
        elif caches and inputs.shape[1:] == (1,):
            self._note(caches, f"a step of {inputs.shape[0]} rows is not traced")
        return out

    def _note(self, caches: Sequence[Any], reason: str) -> None:
        """Write down why steps over these caches are not compiled."""
        self.uncompiled = reason
        if isinstance(caches, PromptCache):
            caches.uncompiled = reason

    def _start_page(
        self, caches: Sequence[TurboQuantCache], prepared: list[Any], out: Any
    ) -> None:
        """Let the next step be traced; the one that gave ``out`` has prepared it."""
        # A trace would take what is not computed yet for a part of every step.
        cast(Any, mx.async_eval)(out)
        self._page = _Page(self._model, caches, prepared)
        # No codes of a cache that is gone are kept.
        drop = functools.partial(_drop_page, weakref.ref(self))
        self._watch = weakref.ref(caches[0], drop)


def _drop_page(owner: weakref.ref[CompiledModel], _: Any) -> None:
    model = owner()
    if model is not None:
        model._page = None


class _Page:
    """The steps between two pages, one graph.

    Args:
        model: The model.
        caches: Its caches, not kept.
        prepared: What identifies them until the next page: `traced.prepared_of`.
    """

    def __init__(
        self, model: nn.Module, caches: Sequence[TurboQuantCache], prepared: list[Any]
    ) -> None:
        self._prepared = prepared
        self._capacities = [traced.buffers_of(cache)[0].shape[2] for cache in caches]
        # Tokens before the recent ones, in the order of the caches.
        older = [cache.offset - cache.recent_length for cache in caches]
        self._distinct = list(dict.fromkeys(older))
        places = [self._distinct.index(count) for count in older]
        refs = [weakref.ref(cache) for cache in caches]
        # Of this object it holds nothing: a circle would keep codes for the collector.
        self._replay: Callable[..., Any] = mx.compile(_traceable(model, refs, places))

    def may_step(self, caches: Sequence[Any]) -> bool:
        """Whether this graph is the next step's, over these caches."""
        return traced.may_advance(caches, self._prepared, self._capacities)

    def __call__(self, inputs: mx.array, caches: Sequence[TurboQuantCache]) -> Any:
        """What the model returns; the caches have one more token."""
        offset = caches[0].offset
        # No name refers to the old buffers when the step runs: it writes in place.
        out, stored = self._replay(
            inputs,
            _number(offset),
            [_number(offset - older) for older in self._distinct],
            [traced.buffers_of(cache) for cache in caches],
        )
        for cache, buffers in zip(caches, stored, strict=True):
            traced.advance(cache, buffers)
        return out


def _traceable(
    model: nn.Module,
    caches: Sequence[weakref.ref[TurboQuantCache]],
    places: Sequence[int],
) -> Callable[..., Any]:
    """One step, for `mx.compile` to trace.

    Args:
        model: The model.
        caches: Its caches.
        places: Of each cache's number of recent tokens, among the distinct ones.
    """

    def step(
        inputs: mx.array,
        offset: mx.array,
        recent: list[mx.array],
        buffers: list[traced.Buffers],
    ) -> tuple[Any, list[traced.Buffers | None]]:
        layers = []
        for ref, place, own in zip(caches, places, buffers, strict=True):
            cache = ref()
            assert cache is not None, "a step over it was just asked for"
            layers.append(traced.TracedLayer(cache, offset, recent[place], own))
        out = model(inputs, cache=layers)
        if any(layer.stored is None for layer in layers):
            raise UnsupportedError("some cache gets no token", EAGER)
        return out, [layer.stored for layer in layers]

    return step


def _number(value: int) -> mx.array:
    """An int32 array (1,), made ahead: see `kernels.arguments.pack_steps`."""
    block, index = divmod(value, _BLOCK)
    return _numbers(block)[index]


@functools.lru_cache(maxsize=64)
def _numbers(block: int) -> list[mx.array]:
    table = mx.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=mx.int32)
    views = [table[i : i + 1] for i in range(_BLOCK)]
    mx.eval(table, views)
    return views


def _reason_of(error: Exception) -> str:
    """The first line of what went wrong in a trace."""
    text = error.reason if isinstance(error, UnsupportedError) else str(error)
    first = (text or type(error).__name__).splitlines()[0]
    return f"the model cannot be traced ({first})"

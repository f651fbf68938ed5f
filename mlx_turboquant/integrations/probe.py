"""A dry run of a model: what each of its layers does with what its cache returns.

The model builds the graph of a few tokens, which nothing evaluates, so no weight is
read. A layer that hands its keys to mlx-lm's attention gets handles on packed codes;
one that computes on them gets decoded arrays; one whose vectors cannot be encoded keeps
its stock cache. The same run tells the shapes of keys and values.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import TurboQuantCache
from ..entries import CacheEntry, kind_reason, nbytes_of
from ..errors import UnsupportedError, UnsupportedModelError
from ..segments import CompressedTokens
from . import hook, vision
from .stock import is_replaceable, labelled_leaves, replace_leaves

#: Token ids of the dry run: a prompt's chunk, then a decode step, as models have code
#: of their own for either.
_CALLS = ((0, 1), (1,))

#: Entries, counted back from a failure, that may have caused it.
_SUSPECTS = 4

_NOT_READ = "its keys choose tokens, nothing attends to them"
_NOT_FILLED = "a text alone puts nothing into it"
_FAILS_DECODED = "the model's own code fails on what it decodes to"


#: By id of the model: its fingerprint when it was run, and what the run said.
_known: dict[int, tuple[tuple[Any, ...], Sequence[CacheEntry]]] = {}


def entries_of(model: nn.Module, stock: Sequence[Any]) -> Sequence[CacheEntry]:
    """A record for each leaf of a model's prompt cache, from one dry run.

    The run is repeated only if the shapes or dtypes of the weights or the kinds of
    caches have changed since, as when a model is split over machines. Hooks the model's
    attention.

    Args:
        model: A model of mlx-lm's.
        stock: Its caches as `stock_caches` makes them; they stay empty.

    Raises:
        UnsupportedModelError: if the model fails whatever its caches are.
    """
    entries = _described(stock)
    weights = (
        (value.shape, value.dtype)
        for module in model.modules()
        for name, value in module.items()
        if isinstance(value, mx.array) and not name.startswith("_")
    )
    fingerprint = (*entries, *weights)
    known = _known.get(id(model))
    if known is not None and known[0] == fingerprint:
        return known[1]
    hook.install(model)
    entries = _dry_run(model, stock, entries)
    _known[id(model)] = (fingerprint, entries)
    weakref.finalize(model, _known.pop, id(model), None)
    return entries


def uncompressed_entries(
    model: nn.Module, stock: Sequence[Any], reason: str
) -> Sequence[CacheEntry]:
    """As `entries_of`, for a model whose caches all stay mlx-lm's, for ``reason``."""
    entries = [entry.left_alone(reason) for entry in _described(stock)]
    return _dry_run(model, stock, entries)


def forget() -> None:
    """Let every model be run anew."""
    _known.clear()


def _described(stock: Sequence[Any]) -> list[CacheEntry]:
    """What the caches themselves say, before any run."""
    entries = []
    for label, leaf in labelled_leaves(stock):
        entry = CacheEntry(
            label,
            type(leaf).__name__,
            sliding_window=getattr(leaf, "max_size", getattr(leaf, "chunk_size", None)),
            keep=getattr(leaf, "keep", 0),
        )
        if not is_replaceable(leaf):
            entry = entry.left_alone(kind_reason(entry.kind))
        entries.append(entry)
    return entries


def _dry_run(
    model: nn.Module, stock: Sequence[Any], entries: Sequence[CacheEntry]
) -> list[CacheEntry]:
    with vision.kept_positions(model):
        run = _try(model, stock, entries)
        while run.error is not None:
            entries, run = _next_fallback(model, stock, entries, run)
    return [
        _completed(entry, leaf, index in run.attended)
        for index, (entry, leaf) in enumerate(zip(entries, run.leaves, strict=True))
    ]


def _completed(entry: CacheEntry, leaf: Any, is_attended: bool) -> CacheEntry:
    """The entry with what its cache held after the run."""
    if entry.decision == "handles" and not is_attended:
        entry = entry.left_alone(_NOT_FILLED if leaf.empty() else _NOT_READ)
    keys, values = getattr(leaf, "keys", None), getattr(leaf, "values", None)
    if isinstance(keys, mx.array) and isinstance(values, mx.array):
        shape = (keys.shape[1], keys.shape[3], values.shape[3])
        return replace(entry, shape=shape, itemsize=keys.dtype.size)
    return replace(entry, state_bytes=nbytes_of(leaf))


@dataclass
class _Run:
    """One run: its caches, which of them were fetched, in order, and attended to."""

    leaves: list[Any]
    calls: int = 0
    fetched: list[int] = field(default_factory=list)
    attended: set[int] = field(default_factory=set)
    error: Exception | None = None

    def got_further_than(self, other: _Run, index: int) -> bool:
        """Whether it outlasted ``other``, which failed at entry ``index``."""
        if self.error is None or self.calls > other.calls:
            return True
        if index in self.fetched:
            return len(self.fetched) > len(other.fetched)
        return max(self.fetched, default=-1) > index


class ProbeCache(TurboQuantCache):
    """Notes in a `_Run` whenever its tokens are fetched or attended to."""

    def __init__(self, index: int, returns_arrays: bool, run: _Run) -> None:
        super().__init__("8,window=0,sink=0,page=32", returns_arrays=returns_arrays)
        self._index, self._run = index, run

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As a `TurboQuantCache`; it was fetched, even if this fails."""
        self._run.fetched.append(self._index)
        return super().update_and_fetch(keys, values)

    def compressed(self) -> tuple[CompressedTokens, CompressedTokens]:
        """As a `TurboQuantCache`; a layer that shares it asks for this alone."""
        self._run.fetched.append(self._index)
        return super().compressed()

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Only attention has queries to show: it was attended to."""
        self._run.attended.add(self._index)


def _try(model: nn.Module, stock: Sequence[Any], entries: Sequence[CacheEntry]) -> _Run:
    run = _Run([])

    def probed(leaf: Any) -> Any:
        index = len(run.leaves)
        entry = entries[index]
        if entry.is_compressed:
            leaf = ProbeCache(index, entry.decision == "returns_arrays", run)
        run.leaves.append(leaf)
        return leaf

    # Copies: the run fills its caches, and may have to start over.
    caches = replace_leaves(copy.deepcopy(list(stock)), probed)
    try:
        for ids in _CALLS:
            vision.call(model, mx.array([ids]), caches)
            run.calls += 1
            run.fetched.clear()
    except Exception as error:  # whatever a model's code makes of a handle
        run.error = error
    return run


def _next_fallback(
    model: nn.Module,
    stock: Sequence[Any],
    entries: Sequence[CacheEntry],
    failed: _Run,
) -> tuple[Sequence[CacheEntry], _Run]:
    """The smallest change that gets further: to one of the last entries fetched.

    A model's code may fail some lines after it fetched the keys it cannot use, or in
    the next layer, so the latest entries are tried one by one.
    """
    error = failed.error
    for index in list(dict.fromkeys(reversed(failed.fetched)))[:_SUSPECTS]:
        for fallback in _fallbacks(entries[index], error):
            trial = [*entries[:index], fallback, *entries[index + 1 :]]
            run = _try(model, stock, trial)
            if run.got_further_than(failed, index):
                return trial, run
    first = (str(error) or type(error).__name__).splitlines()[0]
    raise UnsupportedModelError(
        f"the model fails on a few tokens with a compressed cache ({first})",
        "run it with an uncompressed cache (leave --kv-bits out)",
    ) from error


def _fallbacks(entry: CacheEntry, error: Exception | None) -> list[CacheEntry]:
    """What to try after a failure, the better first."""
    if type(error) is UnsupportedError:
        return [entry.left_alone(error.reason)]  # of these dims, not of this use
    stock = entry.left_alone(_FAILS_DECODED)
    if entry.decision == "returns_arrays":
        return [stock]
    return [replace(entry, decision="returns_arrays"), stock]

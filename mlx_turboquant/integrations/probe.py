"""What each of a model's layers does with what its cache returns, found by trying.

Owns the dry run: the model builds the graph of a few tokens, which nothing evaluates,
so no weight is read. A layer that hands its keys to mlx-lm's attention gets handles on
packed codes; one that computes on them gets decoded arrays; one whose vectors cannot be
encoded keeps its stock cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import TurboQuantCache
from ..errors import UnsupportedError, UnsupportedModelError
from ..segments import CompressedTokens

#: Token ids of the dry run: a prompt's chunk, then a decode step.
_CALLS = ((0, 1), (1,))

#: Entries, counted back from a failure, that may have caused it.
_BLAMED = 4

MakeSlot = Callable[[int], Any]


@dataclass(frozen=True)
class Slot:
    """What one cache entry can be.

    Attributes:
        returns_arrays: The layer wants arrays.
        stock: Why it keeps mlx-lm's cache; "" if it does not.
    """

    returns_arrays: bool = False
    stock: str = ""


_NOT_READ = Slot(stock="its keys choose tokens, nothing attends to them")


@dataclass
class _Log:
    """What one dry run did: which entries were fetched, in order, and attended to."""

    calls: int = 0
    fetched: list[int] = field(default_factory=list)
    attended: set[int] = field(default_factory=set)
    error: Exception | None = None

    def beyond(self, other: _Log, index: int) -> bool:
        """Whether it got further than ``other``, which failed at entry ``index``."""
        if self.error is None or self.calls > other.calls:
            return True
        if index in self.fetched:
            return len(self.fetched) > len(other.fetched)
        return max(self.fetched, default=-1) > index


class _Watched(TurboQuantCache):
    """Notes whenever its tokens are fetched or attended to."""

    def __init__(self, index: int, returns_arrays: bool, log: _Log) -> None:
        super().__init__("8,window=0,sink=0,page=32", returns_arrays=returns_arrays)
        self._index, self._log = index, log

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self._log.fetched.append(self._index)
        return super().update_and_fetch(keys, values)

    def segments(self) -> tuple[CompressedTokens, CompressedTokens]:
        self._log.fetched.append(self._index)
        keys, values = super().segments()
        return replace(keys, observe=self._attended), values

    def _attended(self, q: mx.array, scale: float) -> None:
        self._log.attended.add(self._index)


def probe(
    model: nn.Module, build: Callable[[MakeSlot], list[Any]], count: int
) -> list[Slot]:
    """What each of ``count`` cache entries can be.

    Args:
        model: Its attention is hooked already.
        build: Makes the model's prompt cache; asks its argument for each entry, or
            keeps the stock one where that returns None.
        count: Entries that `build` asks for.

    Raises:
        UnsupportedModelError: if the model fails for another reason.
    """
    slots = [Slot()] * count
    log = _try(model, build, slots)
    while log.error is not None:
        slots, log = _demoted(model, build, slots, log)
    return [
        slot
        if slot.returns_arrays or slot.stock or index in log.attended
        else _NOT_READ
        for index, slot in enumerate(slots)
    ]


def _try(
    model: nn.Module, build: Callable[[MakeSlot], list[Any]], slots: list[Slot]
) -> _Log:
    log = _Log()

    def make(index: int) -> Any:
        slot = slots[index]
        return None if slot.stock else _Watched(index, slot.returns_arrays, log)

    try:
        caches = build(make)
        for ids in _CALLS:
            model(mx.array([ids]), cache=caches)
            log.calls += 1
            log.fetched.clear()
    except Exception as error:  # whatever a model's code makes of a handle
        log.error = error
    return log


def _demoted(
    model: nn.Module,
    build: Callable[[MakeSlot], list[Any]],
    slots: list[Slot],
    failed: _Log,
) -> tuple[list[Slot], _Log]:
    """The smallest change that gets further: to one of the last entries fetched."""
    error = failed.error
    for index in list(dict.fromkeys(reversed(failed.fetched)))[:_BLAMED]:
        for worse in _worse(slots[index], error):
            trial = [*slots[:index], worse, *slots[index + 1 :]]
            log = _try(model, build, trial)
            if log.beyond(failed, index):
                return trial, log
    first = (str(error) or type(error).__name__).splitlines()[0]
    raise UnsupportedModelError(
        f"the model fails on a few tokens with a compressed cache ({first})",
        "run it with an uncompressed cache (leave --kv-bits out)",
    ) from error


def _worse(slot: Slot, error: Exception | None) -> list[Slot]:
    """What to try after a failure, the better first."""
    if type(error) is UnsupportedError:
        return [Slot(stock=error.reason)]  # of these dims, not of this use
    failing = Slot(stock="the model's own code fails on what it decodes to")
    return [failing] if slot.returns_arrays else [Slot(returns_arrays=True), failing]

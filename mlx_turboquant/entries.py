"""`CacheEntry`: what one entry of a model's prompt cache is, and what becomes of it.

A dry run of the model (``integrations/probe.py``) makes one record for each entry. The
cache factory, `Footprint`, `explain` and the choice of bits read it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .cache import min_window
from .spec import CacheSpec

Decision = Literal["handles", "returns_arrays", "stock"]

#: Why mlx-lm's cache stays, by its class, where no dry run said more.
_KIND_REASONS = {
    "RotatingKVCache": "a sliding window already bounds it",
    "ArraysCache": "recurrent state, not keys and values",
    "ChunkedKVCache": "chunked attention trims its own front",
    "ConcatenateKVCache": "made for blocks that are attended once",
    "QuantizedKVCache": "already quantized by mlx-lm",
    "SimpleKVCache": "an encoder's and its decoder's, whose code reads it",
    "KVCache": "no compressed cache was asked for",
}


def kind_reason(kind: str) -> str:
    """Why a cache of mlx-lm's class ``kind`` is not compressed."""
    return _KIND_REASONS.get(kind, "not a kind we know")


@dataclass(frozen=True)
class CacheEntry:
    """One entry of a prompt cache.

    Attributes:
        label: Index in the prompt cache; ``"3.0"`` inside a list of caches.
        kind: Name of the class that mlx-lm would use.
        shape: (KV heads, elements of a key, of a value); None if it holds none.
        sliding_window: Tokens it keeps; None for all.
        keep: First tokens that a sliding window never drops.
        decision: ``"handles"``: it is compressed, and attention reads the codes.
            ``"returns_arrays"``: it is compressed, but decoded whole at each step,
            because the model computes attention itself. ``"stock"``: it stays
            mlx-lm's.
        reason: Why it stays mlx-lm's; "" if it does not.
        state_bytes: Bytes of a state that does not grow; 0 for keys and values.
        itemsize: Bytes of an element of keys and values as the model has them.
        is_bounded: Whether its window is ``max_kv_size``, not the model's own.
    """

    label: str
    kind: str
    shape: tuple[int, int, int] | None = None
    sliding_window: int | None = None
    keep: int = 0
    decision: Decision = "handles"
    reason: str = ""
    state_bytes: int = 0
    itemsize: int = 2
    is_bounded: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheEntry:
        """Itself: what was decided stays, and forks of long prompts cost nothing."""
        return self

    @property
    def is_compressed(self) -> bool:
        """Whether it holds codes, or will once it is long enough."""
        return self.decision != "stock"

    def left_alone(self, reason: str) -> CacheEntry:
        """This entry, staying mlx-lm's for ``reason``."""
        return replace(self, decision="stock", reason=reason)

    def bounded(self, max_kv_size: int, keep: int) -> CacheEntry:
        """This entry under mlx-lm's ``max_kv_size``: no cache keeps all tokens."""
        if self.kind != "KVCache":
            return self
        return replace(
            self,
            kind="RotatingKVCache",
            sliding_window=max_kv_size,
            keep=keep,
            is_bounded=True,
        )

    def under(self, spec: CacheSpec) -> CacheEntry:
        """This entry with caches of ``spec``: a window that is too short stays."""
        if not self.is_compressed or self.sliding_window is None:
            return self
        shortest = min_window(replace(spec, sink=max(spec.sink, self.keep)))
        if self.sliding_window >= shortest:
            return self
        remedy = f"; raise max_kv_size to {shortest}" if self.is_bounded else ""
        return self.left_alone(
            f"its window of {self.sliding_window} tokens is too short for {shortest}: "
            f"sink, window and two pages{remedy}"
        )


class PromptCache(list[Any]):
    """A prompt cache for mlx-lm that knows what was decided on each of its entries.

    The records belong to the list, since mlx-lm's own caches have no place for them.
    They survive ``copy.deepcopy`` and mlx-lm's ``make_prompt_cache``; a new list of the
    same caches has none, and `explain` then says what their classes say.

    Args:
        caches: The caches, one for each layer.
        entries: Their records, in the order of the leaves; empty if there was no dry
            run, as for saved caches.

    Attributes:
        uncompiled: Why a `CompiledModel` takes steps over them as its model is; "" if
            it compiles them, or none does.
        unsaved: Why a file of them would not be whole; "" if it would.
    """

    def __init__(self, caches: Iterable[Any], entries: Sequence[CacheEntry]) -> None:
        super().__init__(caches)
        self.entries = tuple(entries)
        self.uncompiled = ""
        self.unsaved = ""

    def fork(self) -> PromptCache:
        """Another conversation from here on; both hold the same pages of codes.

        It is ``copy.deepcopy``, which mlx-lm's stores of prompts use.

        >>> cache = PromptCache([], ())
        >>> cache.fork() == cache
        True
        """
        return copy.deepcopy(self)


def nbytes_of(cache: Any) -> int:
    """Bytes of a cache of any kind; 0 where it cannot say."""
    try:
        return int(cache.nbytes)
    except (AttributeError, NotImplementedError, TypeError):
        return 0  # some of mlx-lm's caches cannot say while they are empty

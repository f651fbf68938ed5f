"""A layer's cache in a compiled step: what the trace sees of it, what it learns after.

    TracedLayer   stands in for the cache while a step is traced
    advance       tells the cache what a replay of the trace has stored

Between two pages a step changes the buffers of recent tokens and their length, and no
more. What compiles the step is ``integrations/compiled_step.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import mlx.core as mx

from ..backends.gpu import Gpu
from ..backends.traced import EAGER, TracedGpu
from ..errors import UnsupportedModelError
from ..segments import CompressedTokens, PreparedSteps, Shape
from .layer import TurboQuantCache

#: Keys and values of a layer.
Buffers = tuple[mx.array, mx.array]


def refusal(cache: Any) -> str | None:
    """Why no step over this cache can be traced, or None."""
    if type(cache) is not TurboQuantCache:
        return f"its steps change a {type(cache).__name__} in other ways"
    if cache.returns_arrays:
        return "the model computes attention itself, on decoded arrays"
    backend = cache._backend
    if backend is not None and not isinstance(backend, Gpu):
        return f"the {backend.name} backend has no launches to replay"
    return None


def prepared_of(caches: Sequence[TurboQuantCache]) -> list[PreparedSteps] | None:
    """What identifies these caches between two pages; None if one has no page yet.

    New objects take their place whenever codes change, in caches that are copied too.
    """
    if any(cache._backend is None for cache in caches):
        return None
    return [cache._prepared for cache in caches]


def may_advance(
    caches: Sequence[Any], prepared: Sequence[PreparedSteps], capacities: Sequence[int]
) -> bool:
    """Whether a step of one token changes no more than the recent tokens.

    Args:
        caches: The caches of a step.
        prepared: `prepared_of` the caches of the trace.
        capacities: Tokens of its buffers. A trace would write past them unchecked.
    """
    if len(caches) != len(prepared):
        return False
    for cache, own, capacity in zip(caches, prepared, capacities, strict=True):
        if getattr(cache, "_prepared", None) is not own:
            return False  # not a cache of the trace, or one whose codes changed
        offset, recent = cache.offset, cache._tokens.recent
        if (
            offset != caches[0].offset
            or offset >= cache._schedule.next_page_at
            or recent.length >= capacity
            or recent.arrays["keys"].shape[2] != capacity
        ):
            return False
    return True


def buffers_of(cache: TurboQuantCache) -> Buffers:
    """The buffers of recent keys and values."""
    arrays = cache._tokens.recent.arrays
    return arrays["keys"], arrays["values"]


def advance(cache: TurboQuantCache, buffers: Buffers) -> None:
    """One more token is stored: ``buffers`` have it in the first free place."""
    recent = cache._tokens.recent
    recent.arrays = dict(zip(("keys", "values"), buffers, strict=True))
    recent.length += 1
    cache.offset += 1


class TracedTokens(CompressedTokens):
    """A handle that does not know how many tokens it stands for.

    Its buffer of recent tokens is whole, ``recent_length`` its capacity.
    """

    __slots__ = ()

    @property
    def shape(self) -> Shape:
        """Refused: it would be another one at each replay."""
        _refuse("it reads the shape of its cached keys")

    @property
    def stored_length(self) -> int:
        """Refused: it would be another one at each replay."""
        _refuse("it reads how many tokens are cached")


class TracedLayer:
    """One layer's cache, as a model sees it while a step of one token is traced.

    It has what mlx-lm's models use in a decode step, and nothing else: a model that
    asks for more fails in the trace.

    Args:
        cache: The cache, which is not written to and not kept.
        offset: Position (1,) of the token, int32.
        recent: Number (1,) of recent tokens before it, int32.
        buffers: Those of recent keys and values, traced.

    Attributes:
        offset: As given.
        stored: The buffers with the token; None until it came.
    """

    def __init__(
        self,
        cache: TurboQuantCache,
        offset: mx.array,
        recent: mx.array,
        buffers: Buffers,
    ) -> None:
        self.offset, self._recent, self._buffers = offset, recent, buffers
        self.stored: Buffers | None = None
        self._handles = cache.compressed()

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> None:
        """None: one query sees all."""
        if n != 1 or window_size is not None:
            _refuse("it hides tokens of a growing cache from its queries")

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[TracedTokens, TracedTokens]:
        """Store the token and return handles over all, as `TurboQuantCache` does."""
        if self.stored is not None or keys.shape[2] != 1:
            _refuse("it stores more than one token a step")
        # Not `mx.slice_update`: with a start that is an array it launches two kernels.
        # Neither checks its bounds: see `may_advance`.
        place = self._recent.reshape(1, 1, 1, 1)
        stored = [
            mx.put_along_axis(buffer, place, new.astype(buffer.dtype), axis=2)
            for buffer, new in zip(self._buffers, (keys, values), strict=True)
        ]
        self.stored = stored[0], stored[1]
        backend = TracedGpu(self._recent + 1)
        fetched = [
            TracedTokens(
                handle.quantizer,
                handle.sink,
                handle.packed,
                recent,
                recent.shape[2],
                backend=backend,
                prepared=handle.prepared,
            )
            for handle, recent in zip(self._handles, stored, strict=True)
        ]
        return fetched[0], fetched[1]


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModelError(f"the model's steps are not alike: {what}", EAGER)

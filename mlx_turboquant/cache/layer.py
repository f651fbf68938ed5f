"""`TurboQuantCache`: one layer's compressed cache, growing with the text.

Its tokens are in three segments, in the order of the text:

    sink     the first ``spec.sink`` tokens, as the model gave them
    packed   codes, encoded a page at a time; tiles of it in a short text
    recent   between ``window`` and ``window + page`` last tokens, likewise

The first page calibrates the quantizers, which are frozen from then on (`quantizers`).
When tokens move is `schedule`'s. A token's codes never depend on what came after its
page, nor on the steps that tokens came in.

Speaks mlx-lm's cache protocol, but imports nothing of it (see ``integrations``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import mlx.core as mx

from ..attention import dequantize
from ..backends.reference import Reference
from ..backends.select import Choice
from ..errors import UnsupportedError
from ..pacing import PACED_TOKENS, pace
from ..page_table import Moved
from ..pages import PagePool
from ..pool_shelf import PoolShelf
from ..segments import CompressedTokens, PreparedSteps
from ..spec import CacheSpec
from . import state as saved
from .bit_allocation import BitAllocator, LayerSlot
from .protocol import SequenceCache
from .quantizers import LayerQuantizers
from .schedule import DECODE_TOKENS, PackingSchedule, is_short
from .shallow import shallow
from .stored import StoredTokens


class TurboQuantCache(SequenceCache):
    """A drop-in for mlx-lm's ``KVCache`` that stores codes.

    Args:
        spec: What to store, as a `CacheSpec` or its text, such as ``"k4v3"``.
        slot: Its place among the layers whose bits are chosen together; alone if None.
        returns_arrays: Hand out decoded arrays, for models that compute attention.

    >>> TurboQuantCache("k3v3")
    TurboQuantCache(k3v3, empty)
    """

    #: `BatchTurboQuantCache`s as mlx-lm and mlx-vlm ask for them; set there.
    merge: ClassVar[Callable[..., Any]]
    #: Where other caches of its layer have their codes, if they do.
    _shelf: PoolShelf | None = None
    #: Numbers in its header that tell its kind.
    _header_marks: ClassVar[Sequence[str]] = ()
    _wants_all_queries: ClassVar[bool] = False  # not only those of its first page
    to_batch: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        spec: CacheSpec | str | float = "k3v3",
        slot: LayerSlot | None = None,
        returns_arrays: bool = False,
    ) -> None:
        self.returns_arrays = returns_arrays
        self._start(CacheSpec.parse(spec), slot)

    def _start(self, spec: CacheSpec, slot: LayerSlot | None = None) -> None:
        if slot is None and spec.adaptive:
            slot = LayerSlot(BitAllocator(spec, [None]), 0)
        self._requested_spec, self._slot = spec, slot
        self._clear()

    def _clear(self) -> None:
        spec = self._requested_spec
        self.offset = 0
        uncompressed = spec.sink + spec.window + spec.page + DECODE_TOKENS
        self._tokens = StoredTokens(recent_growth=uncompressed, page=spec.page)
        self._schedule = PackingSchedule(spec)
        self._quantizers = LayerQuantizers(
            spec, self._slot, self._schedule, self._tokens.table
        )
        # What attends to the packed tokens, while there are any.
        self._backend: Reference | None = None
        self._prepared = PreparedSteps()
        # (first, count) of stored tokens that no step may see any more.
        self._hidden = (0, 0)
        self._checked_shapes: tuple[Any, ...] = ()

    # What models and generation loops use.

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[CompressedTokens, CompressedTokens] | tuple[mx.array, mx.array]:
        """Append tokens and return what attention should read.

        Args:
            keys: (B, H, N, Dk) of the new tokens, after position encoding.
            values: (B, H, N, Dv).

        Returns:
            Handles over all tokens so far, or arrays if it `returns_arrays`. Until a
            page is packed, attention over them is MLX's own on the model's arrays.

        Raises:
            UnsupportedError: for a head_dim the rotation cannot do, or a shape
                that does not continue what is stored.
        """
        shapes = (keys.shape, values.shape)
        if shapes != self._checked_shapes:
            self._check(keys, values)
            self._checked_shapes = shapes
        self.enter_thread()
        schedule = self._schedule
        if self.offset >= schedule.next_page_at:
            self._pack()
        step = keys.shape[2]
        # Most of a long step is packed at once; what is left gets a buffer with room.
        spare = is_short(step) or self.offset + step < schedule.next_page_at
        self._tokens.recent.append({"keys": keys, "values": values}, spare)
        self.offset += step
        schedule.store(self.offset, step)
        fetched = self.keys_and_values() if self.returns_arrays else self.compressed()
        # The handles keep the buffers they have: packing puts the rest in new ones.
        if schedule.is_due(self.offset, step) and schedule.packs_after_step(step):
            self._pack(step)
        return fetched

    def keys_and_values(
        self,
    ) -> tuple[CompressedTokens, CompressedTokens] | tuple[mx.array, mx.array]:
        """What `update_and_fetch` returned last, for layers that share a cache."""
        compressed = self.compressed()
        return dequantize(*compressed) if self.returns_arrays else compressed

    def compressed(self) -> tuple[CompressedTokens, CompressedTokens]:
        """Handles over everything stored."""
        sides = self._quantizers.sides
        if sides is None:
            raise ValueError("no token was stored yet; update_and_fetch comes first")
        # Queries are wanted until they have set the gains.
        wants = self._wants_all_queries or not self._schedule.is_calibrated
        return self._tokens.handles(
            sides, self._hidden, self._backend, self._prepared, self if wants else None
        )

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """See the queries of the step just stored, which calibrate the keys' gains.

        Whoever computes attention calls it behind `attend`, while a handle has an
        ``observer``. A prompt's first chunk is packed then; without queries the next
        step packs it, calibrated on the keys alone.

        Args:
            q: Queries (B, Hq, L, D) of the last L tokens.
            scale: Factor on the logits.
        """
        if self._schedule.is_calibrated:
            return
        kv_heads = self._tokens.recent.arrays["keys"].shape[1]
        self._quantizers.observe_queries(q, scale, kv_heads, self.offset)
        schedule = self._schedule
        step = q.shape[2]
        if schedule.is_due(self.offset, step) and schedule.packs_after_queries(step):
            self._pack(step)

    def _check(self, keys: mx.array, values: mx.array) -> None:
        if keys.shape[:3] != values.shape[:3]:
            raise UnsupportedError(
                f"keys {keys.shape} and values {values.shape} are not as many",
                "pass a value for each key",
            )
        recent = self._tokens.recent.arrays
        if not recent:
            self._quantizers.build(keys, values)
            return
        for name, new in (("keys", keys), ("values", values)):
            batch, heads, _, dim = recent[name].shape
            got = new.shape
            if (batch, heads, dim) != (got[0], got[1], got[3]):
                raise UnsupportedError(
                    f"{name} {tuple(got)} do not continue a cache of "
                    f"(B, H, D) = {(batch, heads, dim)}",
                    "start a new cache for this batch or model",
                )

    # Moving tokens between segments.

    def _pack(self, step: int = 0) -> None:
        """Encode the oldest recent tokens, as many as are due, behind a step."""
        tokens, schedule = self._tokens, self._schedule
        pending = tokens.recent.views()
        if not schedule.is_packing and not self._quantizers.advance(
            pending["keys"], pending["values"]
        ):
            return
        changed = self._quantizers.reconsider(tokens)
        if self._shelf is not None and (changed or not schedule.packed):
            kind = self._quantizers.kind, *pending["keys"].shape[:2]
            self.move_to(self._shelf.pool_for(kind, self.spec.page), {})
        start = 0 if tokens.packed_length or tokens.sink else self.spec.sink
        first, at, codes = tokens.packed_length, start, []
        while count := schedule.tokens_due(self.offset):
            part = slice(at, at + count)
            keys, values = pending["keys"][:, :, part], pending["values"][:, :, part]
            codes.append(self._quantizers.encode(keys, values, first))
            schedule.set_packed(schedule.packed + count)
            first, at = first + count, at + count
        tokens.pack(codes, sink=start, room=schedule.room)
        self._codes_changed()
        if step >= PACED_TOKENS:
            pace(tokens.arrays)

    def _set_packed(self, count: int) -> None:
        """Other tokens are packed: ``count`` are, or were, codes."""
        self._schedule.set_packed(count)
        self._codes_changed()

    def _codes_changed(self) -> None:
        packed = self._tokens.packed_length
        self._backend = self._quantizers.choice.backend if packed else None
        self._prepared = PreparedSteps()

    def make_room(self) -> None:
        """Forget what the next step cannot see: nothing."""

    def move_to(self, pool: PagePool, moved: Moved) -> None:
        """Keep codes in this pool, as `PageTable.move_to`."""
        if pool is not self._tokens.table.pool:
            self._tokens.move_to(pool, moved)
            self._prepared = PreparedSteps()

    def share_pages(self, shelf: PoolShelf) -> None:
        """Keep codes where other caches of this layer do, from the first page on."""
        self._shelf = shelf

    def __deepcopy__(self, memo: dict[int, Any]) -> TurboQuantCache:
        other = memo[id(self)] = shallow(self)
        if self._slot is not None and self.spec.adaptive:  # bits are still to be chosen
            other._slot = self._slot.fork()
        other._tokens = self._tokens.fork()
        other._schedule = shallow(self._schedule)
        other._quantizers = self._quantizers.fork(
            other._slot, other._schedule, other._tokens.table
        )
        other._prepared = PreparedSteps()
        return other

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, or all there are; returns how many."""
        n = max(0, min(n, self.offset))
        self.offset -= n
        if self.empty():
            self._clear()
            return n
        # Codes of a cut page keep the page's mean, so what is appended again fits them
        # up to the codes' own error, not bit for bit.
        tokens, before = self._tokens, self._tokens.packed_length
        tokens.drop_last(n)
        if tokens.packed_length < before:
            self._decode_cut_tile()
            self._set_packed(self._schedule.packed - before + tokens.packed_length)
        self._quantizers.trim(self.offset)
        self._schedule.trim(self.offset)
        return n

    def _decode_cut_tile(self) -> None:
        """Codes follow whole tiles only: those of a cut one become recent tokens."""
        tokens = self._tokens
        count = tokens.cut_length
        if count:
            decoded = self._quantizers.decode_last(tokens.packed, count)
            tokens.drop_last_codes(count, decoded)

    @property
    def choice(self) -> Choice | None:
        """Its backend, and why no faster one; None while it is empty."""
        return None if self.empty() else self._quantizers.choice

    # Saving, loading and batching.

    @property
    def state(self) -> dict[str, Any]:
        """The stored tokens and a header: all that `from_state` needs."""
        groups = {**self._tokens.state, **self._quantizers.state}
        return saved.to_state(self.spec, groups, self._numbers())

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._restore(*saved.from_state(state, self._header_marks))

    def _numbers(self) -> saved.Numbers:
        """What a file says of the cache besides spec and arrays."""
        tiles = self._tokens.packed.keys.layout is not None
        return {"returns_arrays": int(self.returns_arrays), "tiles": int(tiles)}

    def _restore(
        self, spec: CacheSpec, groups: saved.Groups, numbers: saved.Numbers
    ) -> None:
        self.returns_arrays = bool(numbers["returns_arrays"])
        self._start(spec)
        if groups["recent"]:
            calibrated = bool(groups["packed"] or groups["gains"])
            self._quantizers.load(groups, calibrated)
        tokens, quantizers = self._tokens, self._quantizers
        layouts = quantizers.layouts if numbers["tiles"] else None
        # Into the order of this machine's backend.
        tokens.load(groups, layouts, quantizers.arranged)
        if tokens.packed_length:
            self._decode_cut_tile()
            quantizers.trim(tokens.length)
        self.offset = self._tokens.length
        self._set_packed(self._tokens.packed_length)
        if tokens.packed_length:  # a buffer as packing leaves
            tokens.recent.replace(tokens.recent.views(), self._schedule.room)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TurboQuantCache:
        """A cache equal to the one whose `state` this is.

        Raises:
            FormatError: if the state is not ours, damaged or of a newer version.
        """
        cache = cls.__new__(cls)
        cache.state = state
        return cache

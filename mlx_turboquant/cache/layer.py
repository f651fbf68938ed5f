"""`TurboQuantCache`: one layer's compressed cache, growing with the text.

Owns the three segments and when tokens move between them:

    sink     the first ``spec.sink`` tokens, as the model gave them
    packed   codes, encoded a page at a time
    recent   between ``window`` and ``window + page`` last tokens, likewise

The basis of the codes comes from the first page (`encoder`) and is frozen; keys are
packed minus a mean per page. A token's codes never depend on what came after its page,
and what a step reads is set by how many tokens came before it, not by how they came:
after n tokens, ``page * ((n - sink - window) // page)`` of them are packed.

Speaks mlx-lm's cache protocol, but imports nothing of it (see ``integrations``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..attention import decoded
from ..errors import UnsupportedError
from ..segments import CompressedTokens
from ..spec import CacheSpec
from ..tokens import TokenArrays
from . import state as files
from .bit_allocation import BitAllocator, LayerSlot
from .encoder import Arrays, PageEncoder
from .protocol import SequenceCache

#: Steps of at most this many tokens go through the recent buffer (speculative
#: decoding verifies up to 8); longer ones are prefill and are packed at once.
DECODE_TOKENS = 8
_PACKED_STEP = 128


class TurboQuantCache(SequenceCache):
    """A drop-in for mlx-lm's ``KVCache`` that stores codes.

    Args:
        spec: What to store, as a `CacheSpec` or its text, such as ``"k4v3"``.
        slot: Its place among the layers whose bits are chosen together; alone if None.
        returns_arrays: Hand out decoded arrays, for a model that computes attention itself.

    >>> TurboQuantCache("k3v3")
    TurboQuantCache(k3v3, empty)
    """

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
            slot = LayerSlot(BitAllocator(spec, 1), 0)
        self._asked, self._slot = spec, slot
        self._clear()

    @property
    def spec(self) -> CacheSpec:
        """What it stores: with bits of its own once they are chosen."""
        return self._encoder.spec

    def _clear(self) -> None:
        spec = self._asked
        self._sink: Arrays = {}
        self._packed = TokenArrays(growth=_PACKED_STEP)
        held = spec.sink + spec.window + spec.page + DECODE_TOKENS
        self._recent = TokenArrays(growth=held)
        self._encoder = PageEncoder(spec, self._slot)
        self._sides: tuple[Arrays, dict[str, TokenArrays]] | None = None

    # What models and generation loops use.

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[CompressedTokens, CompressedTokens] | tuple[mx.array, mx.array]:
        """Append tokens and return what attention should read.

        Args:
            keys: (B, H, N, Dk) of the new tokens, after position encoding.
            values: (B, H, N, Dv).

        Returns:
            Handles over all tokens so far, or arrays if it `returns_arrays`. Until something
            is packed, attention over them is MLX's own on the model's own arrays.

        Raises:
            UnsupportedError: for a head_dim the rotation cannot do, or a shape
                that does not continue what is stored.
        """
        self._check(keys, values)
        self._encoder.prepare(keys.shape[3], values.shape[3])
        self._pack(self._due())
        self._recent.append({"keys": keys, "values": values})
        fetched = self.keys_and_values()
        if keys.shape[2] > DECODE_TOKENS and self._encoder.calibrated:
            self._pack(self._due())
        return fetched

    def keys_and_values(
        self,
    ) -> tuple[CompressedTokens, CompressedTokens] | tuple[mx.array, mx.array]:
        """What `update_and_fetch` returned last, for layers that share a cache."""
        keys, values = self.segments()
        return decoded(keys, values) if self.returns_arrays else (keys, values)

    def segments(self) -> tuple[CompressedTokens, CompressedTokens]:
        """Handles over everything stored."""
        encoder = self._encoder
        (k_codec, v_codec), (k_basis, v_basis) = encoder.codecs, encoder.bases
        recent = self._recent.views()
        packed = self._packed_sides() if self._packed.length else {}
        observe = None if encoder.calibrated else self.observe_queries
        return (
            CompressedTokens(
                k_codec,
                k_basis,
                self._sink.get("keys"),
                packed.get("keys"),
                recent["keys"],
                encoder.means,
                observe,
            ),
            CompressedTokens(
                v_codec,
                v_basis,
                self._sink.get("values"),
                packed.get("values"),
                recent["values"],
            ),
        )

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Learn from the queries; a prompt's first chunk can be packed then."""
        if self._encoder.calibrated:
            return
        heads = self._recent.arrays["keys"].shape[1]
        self._encoder.calibration.observe(q, scale, heads, self.offset)
        if q.shape[2] > DECODE_TOKENS:
            self._pack(self._due())

    def _packed_sides(self) -> dict[str, TokenArrays]:
        # The same in all steps between two pages, so kept.
        arrays, length = self._packed.arrays, self._packed.length
        if self._sides is None or self._sides[0] is not arrays:
            sides = {}
            for side in ("keys", "values"):
                prefix = f"{side}_"
                chosen = {
                    name.removeprefix(prefix): array
                    for name, array in arrays.items()
                    if name.startswith(prefix)
                }
                sides[side] = TokenArrays(chosen, length)
            self._sides = (arrays, sides)
        return self._sides[1]

    def _check(self, keys: mx.array, values: mx.array) -> None:
        for name, new in (("keys", keys), ("values", values)):
            held = self._recent.arrays.get(name)
            if held is None:
                continue
            want, got = held.shape, new.shape
            if (want[0], want[1], want[3]) != (got[0], got[1], got[3]):
                raise UnsupportedError(
                    f"{name} {tuple(got)} do not continue a cache of "
                    f"(B, H, D) = {(want[0], want[1], want[3])}",
                    "start a new cache for this batch or model",
                )

    # Moving tokens between segments.

    def _due(self) -> int:
        """Packed tokens after ``offset`` tokens, if nothing was trimmed."""
        settled = self.offset - self.spec.sink - self.spec.window
        return self.spec.page * max(0, settled // self.spec.page)

    def _pack(self, target: int) -> None:
        """Encode the oldest recent tokens until ``target`` tokens are packed."""
        count = target - self._packed.length
        if count <= 0:
            return
        pending = self._recent.views()
        first = self._packed.length == 0
        if first and not self._encoder.settle(pending["keys"], pending["values"]):
            return
        start = self.spec.sink if first else 0
        chosen = {k: v[:, :, start : start + count] for k, v in pending.items()}
        if start:
            self._sink = {k: mx.contiguous(v[:, :, :start]) for k, v in pending.items()}
        stop = start + count
        codes = self._encoder.encode(
            chosen["keys"], chosen["values"], self._packed.length
        )
        self._sides = None  # or it would hold a buffer that is outgrown
        self._packed.append(codes)
        self._recent.replace({k: v[:, :, stop:] for k, v in pending.items()})

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, or all there are; returns how many."""
        n = min(n, self.offset)
        from_recent = min(n, self._recent.length)
        self._recent.drop_last(from_recent)
        from_packed = min(n - from_recent, self._packed.length)
        self._packed.drop_last(from_packed)
        if from_packed:
            self._sides = None
            self._encoder.trim(self._packed.length)
        if from_packed and not self._packed.length:
            # Nothing is packed any more: only the basis stays.
            keep = self.sink_length - (n - from_recent - from_packed)
            kept = {k: v[:, :, :keep] for k, v in self._sink.items()}
            self._sink = {}
            self._recent.replace(kept or self._recent.views())
        if self.empty():
            self._clear()
        self._encoder.calibration.trim(self.offset)
        return n

    # Sizes.

    @property
    def offset(self) -> int:
        """Tokens stored, which is also the position of the next one."""
        return self.sink_length + self._packed.length + self._recent.length

    @property
    def sink_length(self) -> int:
        """Tokens in the sink segment."""
        return self._sink["keys"].shape[2] if self._sink else 0

    @property
    def packed_length(self) -> int:
        """Tokens stored as codes."""
        return self._packed.length

    @property
    def recent_length(self) -> int:
        """Latest tokens stored in the model's dtype."""
        return self._recent.length

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: codes, scales, means, gains, windows, capacity."""
        sink = sum(array.nbytes for array in self._sink.values())
        return self._packed.nbytes + self._recent.nbytes + self._encoder.nbytes + sink

    @property
    def elements(self) -> int:
        """Key and value elements that an uncompressed cache would hold now."""
        held = self._recent.arrays.values()
        width = sum(a.shape[0] * a.shape[1] * a.shape[3] for a in held)
        return self.size() * width

    # Saving, loading and batching.

    @property
    def state(self) -> dict[str, Any]:
        """The stored tokens and a header: all that `from_state` needs."""
        return files.to_state(
            self.spec,
            {
                "sink": self._sink,
                "packed": self._packed.views(),
                "recent": self._recent.views(),
                **self._encoder.state,
            },
            self._notes(),
        )

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._restore(*files.from_state(state))

    def _notes(self) -> files.Notes:
        """What a file says of it besides spec and arrays."""
        return {"decodes": int(self.returns_arrays)}

    def _restore(
        self, spec: CacheSpec, groups: files.Groups, notes: files.Notes
    ) -> None:
        self.returns_arrays = bool(notes["decodes"])
        self._start(spec)
        self._sink = groups["sink"]
        self._packed.replace(groups["packed"])
        self._recent.replace(groups["recent"])
        self._encoder.load(groups, bool(groups["packed"] or groups["gains"]))
        recent = self._recent.arrays
        if recent:
            self._encoder.prepare(recent["keys"].shape[3], recent["values"].shape[3])

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TurboQuantCache:
        """A cache equal to the one whose `state` this is.

        Raises:
            FormatError: if the state is not ours, damaged or of a newer version.
        """
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantCache]) -> Any:
        """One `BatchTurboQuantCache` with a row per cache."""
        from .batch import BatchTurboQuantCache

        return BatchTurboQuantCache.merge(caches)

    def __repr__(self) -> str:
        if self.empty():
            return f"{type(self).__name__}({self.spec}, empty)"
        parts = f"{self.sink_length}+{self.packed_length}+{self.recent_length}"
        bits = 8 * self.nbytes / self.elements
        return (
            f"{type(self).__name__}({self.spec}, {self.offset} tokens = {parts} "
            f"sink+packed+recent, {self.nbytes} bytes, {bits:.2f} bits per element)"
        )

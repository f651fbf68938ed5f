"""`LayerQuantizers`: the two quantizers of one layer, from the first page on.

Calibrates them on the first page (gains, channel order), has their bits chosen together
with the other layers' where the spec says so, and resolves the backend once all that is
final. Which tokens are encoded when is `schedule`'s and `layer`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import cast

import mlx.core as mx

from ..backends import select
from ..backends.select import Choice
from ..codecs import codec_for
from ..codecs.base import Side
from ..gains import centred
from ..packed_codes import PackedCodes
from ..page_table import PageTable
from ..pages import PagePool
from ..quantizer import PageMeans, Quantizer, Sides
from ..spec import CacheSpec, CodecSpec
from ..tiles import TileLayout
from ..tokens import TILE, TokenArrays
from ..transform import ChannelTransform
from .bit_allocation import LayerSlot
from .calibration import Calibration, by_power
from .schedule import PackingSchedule, Phase
from .shallow import shallow
from .stored import StoredTokens

Arrays = dict[str, mx.array]


class LayerQuantizers:
    """What one layer's tokens are encoded and decoded with.

    Args:
        spec: What was asked for; with bits to choose, until they are chosen.
        slot: The layer's place among those whose bits are chosen together, or None.
        schedule: Its phase is moved on here.
        table: The layer's pages, which means are in.

    Attributes:
        spec: What is stored, with bits of its own once they are chosen.
        sides: The quantizers; None until the first vectors have said their dims.
    """

    def __init__(
        self,
        spec: CacheSpec,
        slot: LayerSlot | None,
        schedule: PackingSchedule,
        table: PageTable,
    ) -> None:
        self.spec = spec
        self._table = table
        self.sides: Sides[Quantizer] | None = None
        self._slot, self._schedule = slot, schedule
        self._calibration: Calibration | None = Calibration(
            spec.sink, spec.page, keeps_last=slot is not None and spec.adaptive
        )
        self._gains: Arrays = {}
        self._choice: Choice | None = None
        # Has the model's dtype; caches are copied, and dtypes cannot be.
        self._like = mx.array([])

    def build(self, keys: mx.array, values: mx.array) -> Sides[Quantizer]:
        """Quantizers for vectors like these, with the gains there are so far.

        Args:
            keys: Keys (B, H, N, Dk) in the model's dtype.
            values: Values (B, H, N, Dv).

        Raises:
            UnsupportedError: if a rotation cannot do its dim.
        """
        return self.build_for((keys.shape[3], values.shape[3]), keys.dtype)

    def build_for(self, dims: tuple[int, int], dtype: mx.Dtype) -> Sides[Quantizer]:
        """As `build`, for elements of a key and of a value, and the model's dtype."""
        k_dim, v_dim = dims
        self._like = mx.array([], dtype)
        spec, gains = self.spec, self._gains
        quantizers = []
        of_sides: tuple[tuple[Side, CodecSpec, int], ...]
        of_sides = (("keys", spec.keys, k_dim), ("values", spec.values, v_dim))
        for side, codec_spec, dim in of_sides:
            codec = codec_for(codec_spec, dim, side, spec.seed)
            transform = ChannelTransform(
                codec.rotation, gains.get(side), gains.get(f"{side}_order")
            )
            # A mean of values gains nothing (dev/LOG.md).
            has_means = (
                side == "keys" and spec.center == "page" and codec.wants_centering
            )
            means = PageMeans(spec.page, self._table) if has_means else None
            quantizers.append(Quantizer(codec, transform, side, means))
        self.sides, self._choice = Sides(*quantizers), None
        return self.sides

    @property
    def choice(self) -> Choice:
        """The backend for these quantizers, and why it is not a faster one."""
        if self._choice is None:
            self._choice = select.resolve(*self._built, self._like.dtype)
        return self._choice

    def reconsider(self, tokens: StoredTokens) -> bool:
        """Choose the backend again if that is a matter of proof, and arrange the codes.

        In whole tiles only: what a trim has cut waits for its page to be full again.

        Returns:
            Whether it is another one.
        """
        before = self._choice
        cut = tokens.packed_length % TILE
        if before is None or cut or not select.awaits_proof():
            return False
        self._choice = select.resolve(*self._built, self._like.dtype)
        if self._choice.backend is before.backend:
            return False
        tokens.arrange(self.arranged)
        return True

    def observe_queries(
        self, q: mx.array, scale: float, kv_heads: int, offset: int
    ) -> None:
        """See queries (B, Hq, L, D) of the last L of ``offset`` tokens."""
        if self._calibration is not None:
            self._calibration.observe(q, scale, kv_heads, offset)

    def advance(self, keys: mx.array, values: mx.array) -> bool:
        """Go on towards PACKING with all tokens so far; whether that is reached.

        Bits that are chosen for all layers together are known when every layer has
        been calibrated. The first time they are not, the layer waits; the next time it
        goes on with what is known.

        Args:
            keys: All tokens so far (B, H, T, Dk), uncompressed.
            values: All tokens so far (B, H, T, Dv), uncompressed.
        """
        schedule, slot = self._schedule, self._slot
        waited = schedule.phase is Phase.WAITING
        if self._calibration is not None:
            self._calibrate(self._calibration, keys, values)
            # Its queries have done their work; a long text need not hold them.
            self._calibration = None
            schedule.enter(Phase.WAITING)
        if slot is not None and self.spec.adaptive:
            if not waited and not slot.allocator.complete:
                return False
            dims = keys.shape[3], values.shape[3]
            self.spec = slot.allocator.spec_for(slot.layer, dims)
        self.build(keys, values)
        schedule.enter(Phase.PACKING)
        return True

    def _calibrate(
        self, calibration: Calibration, keys: mx.array, values: mx.array
    ) -> None:
        spec = self.spec
        sides = self.sides or self.build(keys, values)
        backend, centers = self.choice.backend, spec.center == "page"
        page = slice(spec.sink, spec.sink + spec.page)
        keys_page, values_page = keys[:, :, page], values[:, :, page]
        if spec.equalize and sides.keys.codec.wants_equalizing:
            self._gains["keys"] = calibration.key_gains(keys_page, centers, backend)
        if spec.equalize and sides.values.codec.wants_equalizing:
            self._gains["values"] = backend.channel_gains(values_page)
        stored = centred(keys_page) if centers else keys_page
        if sides.keys.codec.wants_ordering:
            self._gains["keys_order"] = by_power(stored)
        if sides.values.codec.wants_ordering:
            self._gains["values_order"] = by_power(values_page)
        if self._slot is not None and spec.adaptive:
            near = spec.window + spec.page // 2
            sensitivity = calibration.far_value_sensitivity(keys, values, near)
            variance = calibration.logit_variance(stored, self._gains.get("keys"))
            self._slot.allocator.add_sensitivity(
                self._slot.layer,
                _number(sensitivity),
                _number(variance),
            )

    def encode(
        self, keys: mx.array, values: mx.array, first: int
    ) -> Sides[TokenArrays]:
        """Codes of tokens (B, H, N, D) that follow ``first`` encoded ones.

        They end where `PackingSchedule.tokens_due` says; `advance` came first.
        """
        if self.sides is None:
            raise ValueError("advance comes before encode")
        backend = self.choice.backend
        return Sides(
            backend.encode(
                self.sides.keys.sampling(self._schedule.mean_sample), keys, first
            ),
            backend.encode(self.sides.values, values, first),
        )

    def arranged(self, side: Side, codes: TokenArrays) -> TokenArrays:
        """Codes of a side in the order that the backend keeps them in."""
        return self.choice.backend.arranged(getattr(self._built, side), codes)

    @property
    def layouts(self) -> Sides[TileLayout | None]:
        """Of codes in tile order."""
        return Sides(*(quantizer.layout for quantizer in self._built))

    @property
    def kind(self) -> Hashable:
        """What layers whose codes fit the same pages have in common."""
        sides = self._built
        codecs = ((quantizer.codec.spec, quantizer.codec.dim) for quantizer in sides)
        return self.choice.backend.name, sides.keys.means is None, *codecs

    def fork(
        self, slot: LayerSlot | None, schedule: PackingSchedule, table: PageTable
    ) -> LayerQuantizers:
        """The same for a copy of the cache, with ``table`` as its pages."""
        other = shallow(self)
        other._slot, other._schedule, other._table = slot, schedule, table
        other._calibration = self._calibration and self._calibration.fork()
        other._gains = dict(self._gains)
        if self.sides is not None:
            other.sides = Sides(*(q.with_pages(table) for q in self.sides))
        return other

    def decode_last(self, packed: Sides[PackedCodes], count: int) -> Arrays:
        """The last ``count`` codes, of one tile, as vectors by side, float32."""
        decoded: Arrays = {}
        for (side, codes), quantizer in zip(packed.items(), self._built, strict=True):
            first = codes.length - count
            place = int(codes.tiles[first // TILE])
            tile = slice(place, place + 1)
            rows = {name: array[:, :, tile] for name, array in codes.arrays.items()}
            cut = TokenArrays(rows, count, layout=codes.layout)
            decoded[side] = quantizer.decode(cut, first=first)
        return decoded

    @property
    def _built(self) -> Sides[Quantizer]:
        if self.sides is None:
            raise ValueError("no vectors were seen yet, so there are no quantizers")
        return self.sides

    def trim(self, stored: int) -> None:
        """Keep what ``stored`` tokens need: gains stay, queries go."""
        if self._calibration is not None:
            self._calibration.trim(stored)

    @property
    def nbytes(self) -> int:
        """Bytes of gains and channel orders."""
        return sum(quantizer.nbytes for quantizer in self.sides or ())

    @property
    def state(self) -> dict[str, Arrays]:
        """Groups of arrays to save."""
        means = None if self.sides is None else self.sides.keys.means
        return {
            "means": {} if means is None else means.state,
            "gains": self._gains,
            "queries": {} if self._calibration is None else self._calibration.state,
        }

    def load(self, groups: Mapping[str, Arrays], calibrated: bool) -> None:
        """Take over what `state` gave.

        Args:
            groups: The arrays, with recent tokens among them.
            calibrated: Whether gains were fixed, so that there may be codes.
        """
        self._gains = dict(groups["gains"])
        sides = self.build(groups["recent"]["keys"], groups["recent"]["values"])
        if sides.keys.means is not None:
            sides.keys.means.state = groups["means"]
        if calibrated:
            self._calibration = None
            chosen = not self.spec.adaptive
            self._schedule.enter(Phase.PACKING if chosen else Phase.WAITING)
        elif self._calibration is not None:
            self._calibration.state = groups["queries"]


def _number(scalar: mx.array | None) -> float | None:
    return None if scalar is None else cast(float, scalar.item())


def quantizers_of(
    spec: CacheSpec, dims: tuple[int, int], dtype: mx.Dtype
) -> Sides[Quantizer]:
    """Quantizers as a cache of ``spec`` begins with, before it sees a text.

    Args:
        spec: What is stored, its bits known.
        dims: Elements of a key and of a value.
        dtype: The model's.
    """
    table = PageTable(PagePool(spec.page))
    made = LayerQuantizers(spec, None, PackingSchedule(spec), table)
    return made.build_for(dims, dtype)

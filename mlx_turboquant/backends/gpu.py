"""The GPU backend: fused decode attention, and tokens in and out of codes by kernels.

Launches of a decode step are `decode_step`'s. Prefill decodes codes by a kernel and
attends as the reference does. The arithmetic is in ``metal/``; tests hold it to the
reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Self

import mlx.core as mx

from ..kernels.arguments import pack, pack_bytes
from ..kernels.codes import (
    EncodeArguments,
    GainsArguments,
    MaterializeArguments,
    OrderArguments,
    PageMeansArguments,
    RotateArguments,
)
from ..kernels.kernel import Launcher
from ..kernels.tuning import UNTUNED, Heads, Tuning
from ..quantizer import Quantizer
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from ..transform import ChannelTransform
from . import specialize
from .call import AttendCall, BatchCall, in_numbers
from .code_launches import (
    encode_launch,
    gains_launch,
    materialize_launch,
    order_launch,
    page_means_launch,
    rotate_launch,
)
from .decode_step import DecodeStep, kind_of
from .geometry import machine_simdgroups
from .reference import Reference, packed_of
from .specialize import MAX_DIM, placeholder, rotates_in_kernel

#: Query tokens that one fused step takes; more of them are prefill.
MAX_STEP = 16


class Gpu(Reference):
    """Kernels on one launcher.

    Args:
        launcher: What runs them.
        simdgroups: How many a decode step may use; None for as many as fill the
            machine.
        tuning: What is better here than on every machine; it moves speed only.
        tunings: The same for some heads only.
    """

    def __init__(
        self,
        launcher: Launcher,
        simdgroups: int | None = None,
        tuning: Tuning = UNTUNED,
        tunings: Mapping[Heads, Tuning] = MappingProxyType({}),
    ) -> None:
        self.launcher = launcher
        self.simdgroups = simdgroups or machine_simdgroups(launcher.name)
        self.tuning, self.tunings = tuning, tunings
        #: Shown each prepared step and its first call; None if nobody wants to see.
        self.watch: Callable[[AttendCall | BatchCall, DecodeStep], None] | None = None

    @property
    def name(self) -> str:
        """What `explain` calls it: the launcher's name."""
        return self.launcher.name

    @property
    def joins(self) -> bool:
        """True: a batch is one launch of each pass."""
        return True

    def tuned(
        self, tuning: Tuning, tunings: Mapping[Heads, Tuning] = MappingProxyType({})
    ) -> Self:
        """The same kernels, launched otherwise."""
        twin = copy.copy(self)
        twin.tuning, twin.tunings = tuning, tunings
        return twin

    def refuse(self, keys: Quantizer, values: Quantizer) -> str | None:
        """Why the attention kernels cannot read what these encode, or None."""
        return specialize.refuse(keys.codec, values.codec)

    def attend(self, call: AttendCall) -> mx.array:
        """As `Reference.attend`; up to `MAX_STEP` query tokens are fused."""
        if call.q.shape[2] > MAX_STEP:
            return super().attend(call._replace(mask=in_numbers(call.mask, call.q)))
        return self._step(call)

    def attend_batch(self, call: BatchCall) -> mx.array | None:
        """As `Reference.attend_batch`: in the launches of one row."""
        return None if call.q.shape[2] > MAX_STEP else self._step(call)

    def _step(self, call: AttendCall | BatchCall) -> mx.array:
        prepared, key = call.keys.prepared, kind_of(call)
        step = prepared.get(key)
        if step is None:
            step = prepared[key] = self.prepare(call)
            if self.watch is not None:
                self.watch(call, step)
        out: mx.array = step(call)
        return out

    def prepare(self, call: AttendCall | BatchCall) -> DecodeStep:
        """What attends from this call on, until the packed tokens change."""
        tuning = self.tunings.get(_heads_of(call), self.tuning)
        return DecodeStep(self.launcher, call, self.simdgroups, tuning)

    def encode_query(self, transform: ChannelTransform, q: mx.array) -> mx.array:
        """As `Reference.encode_query`, by a kernel where one rotates."""
        return self._rotate(transform, q, inverse=False)

    def decode_output(self, transform: ChannelTransform, out_rot: mx.array) -> mx.array:
        """As `Reference.decode_output`, by a kernel where one rotates."""
        return self._rotate(transform, out_rot, inverse=True)

    def _rotate(
        self, transform: ChannelTransform, x: mx.array, inverse: bool
    ) -> mx.array:
        if not rotates_in_kernel(transform.rotation):
            definition = super().decode_output if inverse else super().encode_query
            return definition(transform, x)
        batch, heads, tokens, dim = x.shape
        kv_heads = heads if transform.gains is None else transform.gains.shape[1]
        signs = specialize.query_signs(transform, batch * kv_heads)
        arguments = RotateArguments(tokens, heads, kv_heads, batch)
        launch = rotate_launch(dim, x.dtype, arguments, inverse)
        (out,) = self.launcher(launch, [x, signs, pack(arguments)])
        return out.swapaxes(1, 2) if inverse else out

    def transient_bytes(self, dtype: mx.Dtype) -> int:
        """Of the element itself: nothing else is made on the way."""
        return dtype.size

    def materialize_rot(
        self, side: CompressedTokens, heads: slice, dtype: mx.Dtype
    ) -> mx.array:
        """As `Reference.materialize_rot`, by one kernel."""
        if side.packed is None or side.packed.layout is None:
            return super().materialize_rot(side, heads, dtype)
        recent, sink = side.recent_tokens, side.sink
        transform = side.quantizer.transform
        if not rotates_in_kernel(transform.rotation):
            recent = transform.encode(recent) if side.recent_length else recent
            recent = recent.astype(dtype)
            sink = None if sink is None else transform.encode(sink).astype(dtype)
        return self._materialize(side, heads, dtype, sink, recent)

    def decode_rot(
        self, side: CompressedTokens, dtype: mx.Dtype, heads: slice
    ) -> mx.array:
        """As `Reference.decode_rot`, by the same kernel."""
        if packed_of(side).layout is None:
            return super().decode_rot(side, dtype, heads)
        return self._materialize(side, heads, dtype, None, None)

    def _materialize(
        self,
        side: CompressedTokens,
        heads: slice,
        dtype: mx.Dtype,
        sink: mx.array | None,
        recent: mx.array | None,
    ) -> mx.array:
        """Packed tokens of some heads, between others where there are any."""
        quantizer, codes = side.quantizer, packed_of(side)
        if codes.layout is None:
            raise ValueError("codes are in vector order; see Gpu.arranged")
        batch, all_heads = side.recent.shape[:2]
        first, stop, _ = heads.indices(all_heads)
        means, transform = quantizer.means, quantizer.transform
        arguments = MaterializeArguments(
            sink=0 if sink is None else sink.shape[2],
            packed=codes.length,
            recent=0 if recent is None else recent.shape[2],
            heads=stop - first,
            first_head=first,
            all_heads=all_heads,
            batch=batch,
            page=means.page if means else 1,
        )
        plain = side.recent if recent is None else recent
        plain = plain if plain.size else specialize.stand_in(plain)
        rows = None if means is None else means.rows
        launch = materialize_launch(
            codes.layout,
            (plain.dtype, dtype),
            arguments,
            rotates_in_kernel(transform.rotation),
            rows is not None,
        )
        (out,) = self.launcher(
            launch,
            [
                codes.arrays["words"],
                codes.arrays["scales"],
                pack_bytes(codes.tiles.tobytes()),
                specialize.format_of(quantizer.codec).exact_params,
                placeholder(mx.float16) if rows is None else rows,
                plain if sink is None else sink,
                plain,
                specialize.key_signs(transform, batch * all_heads),
                pack(arguments),
            ],
        )
        return out

    def encode(self, quantizer: Quantizer, x: mx.array, first: int) -> TokenArrays:
        """As `Quantizer.encode`, in tile order.

        Codecs without an encoding kernel are left to it.
        """
        codec, form = quantizer.codec, quantizer.codec.encode_format
        if form is None or codec.dim > MAX_DIM:
            return self.arranged(quantizer, quantizer.encode(x, first))
        self._add_means(quantizer, x, first)
        means = quantizer.means
        batch, kv_heads, tokens, _ = x.shape
        transform = quantizer.transform
        rotates = rotates_in_kernel(transform.rotation)
        launch = encode_launch(
            form, x.dtype, x.shape, rotates, centers=means is not None
        )
        page = means.page if means else 1
        begun = first // page  # pages before x
        rows = None
        if means is not None:
            rows = means.of_pages(begun, -(-(first + tokens) // page))
        words, scales = self.launcher(
            launch,
            [
                x if rotates else transform.encode(x).astype(x.dtype),
                specialize.key_signs(transform, batch * kv_heads),
                placeholder(mx.float16) if rows is None else rows,
                form.table,
                pack(
                    EncodeArguments(tokens, kv_heads, batch, first - begun * page, page)
                ),
            ],
        )
        codes = TokenArrays({"words": words, "scales": scales}, tokens)
        return self.arranged(quantizer, codes)

    def _add_means(self, quantizer: Quantizer, x: mx.array, first: int) -> None:
        """As `Quantizer.add_means`, by a kernel where one rotates."""
        means, transform = quantizer.means, quantizer.transform
        if not rotates_in_kernel(transform.rotation):
            quantizer.add_means(x, first)
            return
        begun = quantizer.pages_begun(x, first)
        if means is None or begun is None:
            return
        batch, kv_heads, tokens, dim = begun.shape
        arguments = PageMeansArguments(
            tokens // means.sample, means.sample, kv_heads, batch
        )
        launch = page_means_launch(dim, x.dtype, arguments)
        signs = specialize.key_signs(transform, batch * kv_heads)
        (rows,) = self.launcher(launch, [begun, signs, pack(arguments)])
        means.append(rows)

    def channel_gains(
        self, x: mx.array, centers: bool = False, queries: mx.array | None = None
    ) -> mx.array:
        """As `Reference.channel_gains`, by a kernel."""
        _, kv_heads, tokens, dim = x.shape
        if dim > MAX_DIM:
            return super().channel_gains(x, centers, queries)
        q = x if queries is None else queries
        launch = gains_launch(x.shape, (x.dtype, q.dtype), centers, queries is not None)
        arguments = GainsArguments(tokens, kv_heads, q.shape[1] // kv_heads)
        (gains,) = self.launcher(launch, [x, q, pack(arguments)])
        return gains

    def arranged(self, quantizer: Quantizer, codes: TokenArrays) -> TokenArrays:
        """Codes in tile order."""
        if codes.layout is not None:
            return codes
        layout = quantizer.layout
        words, scales = mx.contiguous(codes.view("words")), codes.view("scales")
        batch, kv_heads, tokens, _ = words.shape
        arrays = self.launcher(
            order_launch(layout, batch, kv_heads, tokens),
            [words, mx.contiguous(scales), pack(OrderArguments(tokens))],
        )
        return TokenArrays(
            dict(zip(("words", "scales"), arrays, strict=True)), tokens, layout=layout
        )


def _heads_of(call: AttendCall | BatchCall) -> Heads:
    batch, query_heads, steps, _ = call.q.shape
    kv_heads = call.keys.recent.shape[1]
    return Heads(batch * kv_heads, query_heads // kv_heads * steps)

"""The GPU backend: fused decode attention, and tokens in and out of codes by kernels.

Launches of a decode step are `decode_step`'s. Prefill decodes codes by a kernel and
attends as the reference does. The arithmetic is in ``metal/``; tests hold it to the
reference.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..codecs.kernel_format import EncodeFormat
from ..kernels.arguments import pack
from ..kernels.codes import (
    ENCODE_SCALAR,
    ENCODE_TRELLIS,
    DecodeArguments,
    EncodeArguments,
    OrderArguments,
)
from ..kernels.kernel import Launch, Launcher
from ..quantizer import Quantizer
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from . import specialize
from .call import AttendCall
from .code_launches import decode_launch, order_launch
from .decode_step import DecodeStep, kind_of
from .geometry import machine_simdgroups
from .reference import Reference, packed_of
from .specialize import MAX_DIM, placeholder, rotates_in_kernel

#: Query tokens that one fused step takes; more of them are prefill.
MAX_STEP = 8
_ENCODE_SIMDGROUPS = 4
#: Vectors that a simdgroup searches for: their ways back go side by side.
_SEARCHES = 2
#: Threadgroup memory that one threadgroup's searches may take, in bytes.
_SEARCH_BYTES = 24 << 10


class Gpu(Reference):
    """Kernels on one launcher.

    Args:
        launcher: What runs them.
        simdgroups: How many a decode step may use; None for as many as fill the
            machine.
        multiply_adds: As `DecodeStep` takes it.
    """

    def __init__(
        self,
        launcher: Launcher,
        simdgroups: int | None = None,
        multiply_adds: bool | None = None,
    ) -> None:
        self.launcher = launcher
        self.simdgroups = simdgroups or machine_simdgroups(launcher.name)
        self.multiply_adds = multiply_adds

    @property
    def name(self) -> str:
        """What `explain` calls it: the launcher's name."""
        return self.launcher.name

    def refuse(self, keys: Quantizer, values: Quantizer) -> str | None:
        """Why the attention kernels cannot read what these encode, or None."""
        return specialize.refuse(keys.codec, values.codec)

    def attend(self, call: AttendCall) -> mx.array:
        """As `Reference.attend`; up to `MAX_STEP` query tokens are fused."""
        if call.q.shape[2] > MAX_STEP:
            return super().attend(call)
        prepared, key = call.keys.prepared, kind_of(call)
        step = prepared.get(key)
        if step is None:
            step = prepared[key] = DecodeStep(
                self.launcher, call, self.simdgroups, self.multiply_adds
            )
        out: mx.array = step(call)
        return out

    def decode_rot(
        self, side: CompressedTokens, dtype: mx.Dtype, heads: slice
    ) -> mx.array:
        """As `Reference.decode_rot`, the codes decoded by a kernel."""
        quantizer, codes = side.quantizer, packed_of(side)
        if codes.layout is None:
            return super().decode_rot(side, dtype, heads)
        form = specialize.format_of(quantizer.codec)
        words, scales = codes.view("words", heads), codes.view("scales", heads)
        batch, kv_heads = words.shape[:2]
        tokens = codes.length
        launch = decode_launch(codes.layout, dtype, batch, kv_heads, tokens)
        arguments = pack(DecodeArguments(tokens, kv_heads, batch))
        (centered,) = self.launcher(
            launch, [words, scales, form.exact_params, arguments]
        )
        return quantizer.decode_rot(codes, dtype, heads, centered)

    def encode(self, quantizer: Quantizer, x: mx.array, first: int) -> TokenArrays:
        """As `Quantizer.encode`, in tile order.

        Codecs without an encoding kernel are left to it.
        """
        codec, form = quantizer.codec, quantizer.codec.encode_format
        if form is None or codec.dim > MAX_DIM:
            return self.arranged(quantizer, quantizer.encode(x, first))
        quantizer.add_means(x, first)
        means = quantizer.means
        batch, kv_heads, tokens, _ = x.shape
        transform = quantizer.transform
        rotates = rotates_in_kernel(transform.rotation)
        launch = _encode_launch(
            form, x.dtype, x.shape, rotates, centers=means is not None
        )
        rows = None if means is None else means.rows
        words, scales = self.launcher(
            launch,
            [
                x if rotates else transform.encode(x).astype(x.dtype),
                specialize.key_signs(transform, batch * kv_heads),
                placeholder(mx.float16) if rows is None else rows,
                form.table,
                pack(
                    EncodeArguments(
                        tokens, kv_heads, batch, first, means.page if means else 1
                    )
                ),
            ],
        )
        codes = TokenArrays({"words": words, "scales": scales}, tokens)
        return self.arranged(quantizer, codes)

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


@functools.lru_cache(maxsize=256)
def _encode_launch(
    form: EncodeFormat,
    dtype: mx.Dtype,
    shape: tuple[int, int, int, int],
    rotates: bool,
    centers: bool,
) -> Launch:
    batch, kv_heads, tokens, dim = shape
    vectors = batch * kv_heads * tokens
    if form.kernel == "scalar":
        kernel, simdgroups, searches = ENCODE_SCALAR, _ENCODE_SIMDGROUPS, 1
        own: dict[str, Any] = {}
    else:
        kernel = ENCODE_TRELLIS
        simdgroups, searches = _searches_of(form.template["COUNT"])
        own = {"VECTORS": searches}
    groups = -(-vectors // (simdgroups * searches))
    template = {
        "T": dtype,
        "DIM": dim,
        **form.template,
        **own,
        "ROTATE": rotates,
        "CENTER": centers,
        "SIMDGROUPS": simdgroups,
    }
    return Launch(
        kernel,
        list(template.items()),
        grid=(32 * simdgroups * groups, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(batch, kv_heads, tokens, form.words), (*shape[:3], 1)],
        output_dtypes=[mx.uint32, mx.float16],
    )


def _searches_of(count: int) -> tuple[int, int]:
    """Simdgroups to a threadgroup, and vectors to a simdgroup, of a trellis search.

    A search holds its steps and half a byte a branch, 20 bytes for each of ``count``
    elements, and a simdgroup two buffers of 128 costs.
    """
    vectors = max(1, min(_SEARCHES, _SEARCH_BYTES // (20 * count)))
    simdgroups = _SEARCH_BYTES // (20 * count * vectors + 1024)
    return max(1, min(_ENCODE_SIMDGROUPS, simdgroups)), vectors

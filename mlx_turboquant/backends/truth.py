"""What is true of attention and of codes, given what kernels are given; and how nearly.

The truth is the reference's, in float32. Where no kernel rotates, MLX does it before a
kernel runs and rounds to the model's dtype, 8 bits of bfloat16 even: that is no fault
of the kernel's. So the truth begins from the very same rounded vectors, and a kernel
that is 1% off cannot hide behind their error.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from ..quantizer import Quantizer
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from ..transform import ChannelTransform
from .call import AttendCall
from .reference import Reference
from .specialize import rotates_in_kernel

#: Largest relative error of a result, and of a single row of attention. Kernels compute
#: in halves; a result 1% off is over it.
TOLERANCE, ROW_TOLERANCE = 5e-3, 2e-2
#: Of attention whose output is rounded to bfloat16 twice, as kernels write it and
#: rotated back: 0.004 was seen.
_TWICE_ROUNDED_TOLERANCE = 7e-3
TRUTH = Reference()
Device = mx.Device | mx.DeviceType


def tolerance_of(call: AttendCall) -> float:
    """Largest relative error of kernels' attention."""
    if call.q.dtype != mx.bfloat16 or _is_rotated_by_kernels(call.values):
        return TOLERANCE
    return _TWICE_ROUNDED_TOLERANCE


def attention_as_given(call: AttendCall, device: Device = mx.cpu) -> mx.array:
    """Attention (B, Hq, L, Dv) float32 over what kernels get of a call.

    Rotations are made where they are for kernels, on MLX's default device, all else on
    ``device``.
    """
    keys, values = (_side_as_given(side, device) for side in (call.keys, call.values))
    q = _queries_as_given(call, device)
    transform, dtype = values.quantizer.transform, call.q.dtype
    with mx.stream(device):
        out = TRUTH.attend(call._replace(q=q, keys=keys, values=values))
        if not _is_rotated_by_kernels(values):
            # What the kernel writes is rounded before it is rotated back.
            each = _of_query_heads(transform, out.shape[1])
            out = each.decode(each.encode(out).astype(dtype))
    return out


def codes_as_given(quantizer: Quantizer, x: mx.array) -> TokenArrays:
    """Codes of vectors x (B, H, N, D), the first ones; adds their means.

    All but rotations is done on the CPU.
    """
    means = quantizer.means
    centred = rotated_as_given(quantizer.transform, x)
    with mx.stream(mx.cpu):
        quantizer.add_means(x, 0)
        if means is not None:
            centred = centred - means.of_tokens(0, x.shape[2])
        return quantizer.codec.encode(centred)


def rotated_as_given(transform: ChannelTransform, x: mx.array) -> mx.array:
    """Vectors x (B, H, N, D) in the codes' basis, float32, as encoders see them."""
    if rotates_in_kernel(transform.rotation):
        with mx.stream(mx.cpu):
            return transform.encode(x)
    given = transform.encode(x).astype(x.dtype)
    with mx.stream(mx.cpu):
        return given.astype(mx.float32)


def _queries_as_given(call: AttendCall, device: Device) -> mx.array:
    """Queries (B, Hq, L, D) float32 whose rotated form is what kernels get."""
    q, transform = call.q, call.keys.quantizer.transform
    if _is_rotated_by_kernels(call.keys):
        with mx.stream(device):
            return q.astype(mx.float32)
    rounded_rot = TRUTH.encode_query(transform, q)
    each = _of_query_heads(transform, q.shape[1])
    with mx.stream(device):
        back = each.decode(rounded_rot.astype(mx.float32))
        # Queries are times the gains where keys are over them.
        return back if each.gains is None else back / (each.gains * each.gains)


def _side_as_given(side: CompressedTokens, device: Device) -> CompressedTokens:
    """The same of the tokens that are not packed."""
    transform, rotates = side.quantizer.transform, not _is_rotated_by_kernels(side)

    def given(x: mx.array) -> mx.array:
        rounded_rot = transform.encode(x).astype(x.dtype) if rotates else None
        with mx.stream(device):
            if rounded_rot is None:
                return x.astype(mx.float32)
            return transform.decode(rounded_rot.astype(mx.float32))

    sink = None if side.sink is None else given(side.sink)
    return replace(side, sink=sink, recent=given(side.recent))


def _of_query_heads(transform: ChannelTransform, heads: int) -> ChannelTransform:
    """The same with the gains and the order of so many query heads."""
    gains, order = transform.gains, transform.channel_order

    def repeated(x: mx.array | None) -> mx.array | None:
        return None if x is None else mx.repeat(x, heads // x.shape[1], axis=1)

    return replace(transform, gains=repeated(gains), channel_order=repeated(order))


def _is_rotated_by_kernels(side: CompressedTokens) -> bool:
    return rotates_in_kernel(side.quantizer.transform.rotation)

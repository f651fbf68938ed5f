"""What is true of attention and of codes, given what kernels are given.

The truth is the reference's, in float32 on the CPU. Where no kernel rotates, MLX does
it before a kernel runs and rounds to the model's dtype, 8 bits of bfloat16 even: that
is no fault of the kernel's. So the truth begins from the very same rounded vectors, and
a kernel that is 1% off cannot hide behind their error.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from ..backends.call import AttendCall
from ..backends.specialize import rotates_in_kernel
from ..quantizer import Quantizer
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from ..transform import ChannelTransform
from .judge import TRUTH


def attention_as_given(call: AttendCall) -> mx.array:
    """Attention (B, Hq, L, Dv) float32, evaluated, over what kernels get of a call."""
    keys, values = (_side_as_given(side) for side in (call.keys, call.values))
    q = _queries_as_given(call.keys.quantizer.transform, call.q)
    transform, dtype = values.quantizer.transform, call.q.dtype
    with mx.stream(mx.cpu):
        out = TRUTH.attend(call._replace(q=q, keys=keys, values=values))
        if not rotates_in_kernel(transform.rotation):
            # What the kernel writes is rounded before it is rotated back.
            each = _of_query_heads(transform, out.shape[1])
            out = each.decode(each.encode(out).astype(dtype))
        mx.eval(out)
    return out


def codes_as_given(quantizer: Quantizer, x: mx.array) -> TokenArrays:
    """Codes of vectors x (B, H, N, D), the first ones; adds their means."""
    transform, means = quantizer.transform, quantizer.means
    if rotates_in_kernel(transform.rotation):
        with mx.stream(mx.cpu):
            return TRUTH.encode(quantizer, x, 0)
    given = transform.encode(x).astype(x.dtype)
    mx.eval(given)
    with mx.stream(mx.cpu):
        quantizer.add_means(x, 0)
        centred = given.astype(mx.float32)
        if means is not None:
            centred = centred - means.of_tokens(0, x.shape[2])
        return quantizer.codec.encode(centred)


def _queries_as_given(transform: ChannelTransform, q: mx.array) -> mx.array:
    """The same of queries (B, Hq, L, D)."""
    if rotates_in_kernel(transform.rotation):
        return q.astype(mx.float32)
    back = _back(transform, TRUTH.encode_query(transform, q))
    gains = _of_query_heads(transform, q.shape[1]).gains
    with mx.stream(mx.cpu):
        # Queries are times the gains where keys are over them.
        return back if gains is None else back / (gains * gains)


def _of_query_heads(transform: ChannelTransform, heads: int) -> ChannelTransform:
    """The same with gains of so many query heads: proofs have no channel order."""
    if transform.gains is None:
        return transform
    with mx.stream(mx.cpu):
        gains = mx.repeat(transform.gains, heads // transform.gains.shape[1], axis=1)
    return replace(transform, gains=gains)


def _side_as_given(side: CompressedTokens) -> CompressedTokens:
    transform = side.quantizer.transform

    def given(x: mx.array) -> mx.array:
        if rotates_in_kernel(transform.rotation):
            return x.astype(mx.float32)
        return _back(transform, transform.encode(x).astype(x.dtype))

    sink = None if side.sink is None else given(side.sink)
    return replace(side, sink=sink, recent=given(side.recent))


def _back(transform: ChannelTransform, rounded_rot: mx.array) -> mx.array:
    """Rounded vectors, made on the device under test, out of the codes' basis."""
    mx.eval(rounded_rot)
    with mx.stream(mx.cpu):
        back = transform.decode(rounded_rot.astype(mx.float32))
        mx.eval(back)
    return back

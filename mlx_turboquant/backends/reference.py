"""Attention over segments in plain mx: runs anywhere, and defines what is correct.

Owns decoding for attention, its memory bound, and the change of basis around it: while
there are codes, q, sink and recent tokens are taken into the codes' basis and the
output out of it.

A slice of KV heads at a time is decoded and handed to MLX's own attention, so the
transient never exceeds `SLICE_BYTES` or one KV head, whichever is more: for a model
with 32 layers of 8 heads, one head is 1/256 of the uncompressed cache.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..codecs import Codec
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from ..transform import ChannelTransform, PageMeans

#: Bound on the decoded slice and the intermediates of decoding it.
SLICE_BYTES = 256 << 20
# uint8 codes, float32 levels and product, the result and its concatenation: what MLX's
# allocator was seen to hold at once for float32 models.
_BYTES_PER_ELEMENT = 20

Decode = Callable[[CompressedTokens, slice, mx.Dtype], mx.array]


def decode(side: CompressedTokens, heads: slice, dtype: mx.Dtype) -> mx.array:
    """The packed tokens of some heads (B, heads, T_p, D), in the basis, no means."""
    assert side.packed is not None
    return side.codec.decode(side.packed, dtype, heads)


def encode(
    keys: mx.array,
    values: mx.array,
    means: PageMeans | None,
    first: int,
    bases: tuple[ChannelTransform, ChannelTransform],
    codecs: tuple[Codec, Codec],
) -> tuple[TokenArrays, TokenArrays]:
    """Codes of tokens that follow ``first`` packed ones.

    Args:
        keys: (B, H, N, Dk), as the model gave them.
        values: (B, H, N, Dv).
        means: Taken off the keys, rows for these tokens included.
        first: Packed tokens before these.
        bases: Of keys and values.
        codecs: Of keys and values.
    """
    return (
        encode_side(keys, means, first, bases[0], codecs[0]),
        encode_side(values, None, first, bases[1], codecs[1]),
    )


def encode_side(
    x: mx.array,
    means: PageMeans | None,
    first: int,
    basis: ChannelTransform,
    codec: Codec,
) -> TokenArrays:
    """`encode` of keys or values alone."""
    x_rot = basis.encode(x)
    if means is not None:
        x_rot = x_rot - means.of_tokens(first, x.shape[2])
    return codec.encode(x_rot)


def attend(
    q: mx.array,
    keys: CompressedTokens,
    values: CompressedTokens,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    decode: Decode = decode,
) -> mx.array:
    """Softmax attention over sink, packed and recent tokens.

    Args:
        q: (B, Hq, L, Dk), not rotated, not scaled. Hq is a multiple of H.
        keys: H heads, T tokens.
        values: H heads, T tokens, Dv elements.
        scale: Factor on the logits.
        mask: None, ``"causal"`` (last query sees all), or a bool or additive array
            that broadcasts to (B, Hq, L, T).
        sinks: Learned sink logits (Hq,), or None.
        decode: What decodes the packed tokens.

    Returns:
        (B, Hq, L, Dv) in q's dtype, not rotated.
    """
    if keys.packed is None:
        return mx.fast.scaled_dot_product_attention(
            q, keys.recent, values.recent, scale=scale, mask=mask, sinks=sinks
        )
    q_rot = keys.basis.encode_query(q).astype(q.dtype)
    out_rot = attend_rot(q_rot, keys, values, scale, mask, sinks, decode)
    return values.basis.decode(out_rot).astype(q.dtype)


def attend_rot(
    q_rot: mx.array,
    keys: CompressedTokens,
    values: CompressedTokens,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    decode: Decode,
) -> mx.array:
    """As `attend`, from q in the keys' basis to the output in the values' basis."""
    heads = keys.shape[1]
    group = q_rot.shape[1] // heads
    step = heads_per_slice(keys, values)
    outputs = []
    for first in range(0, heads, step):
        kv = slice(first, min(first + step, heads))
        q_heads = slice(kv.start * group, kv.stop * group)
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                q_rot[:, q_heads],
                materialize_rot(keys, kv, q_rot.dtype, decode),
                materialize_rot(values, kv, q_rot.dtype, decode),
                scale=scale,
                mask=_mask_heads(mask, q_heads),
                sinks=None if sinks is None else sinks[q_heads],
            )
        )
    return mx.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def heads_per_slice(keys: CompressedTokens, values: CompressedTokens) -> int:
    """KV heads decoded at once: as many as fit in `SLICE_BYTES`, at least one."""
    batch, heads, length, k_dim = keys.shape
    per_head = batch * length * (k_dim + values.shape[-1]) * _BYTES_PER_ELEMENT
    return max(1, min(heads, SLICE_BYTES // per_head))


def materialize_rot(
    side: CompressedTokens, heads: slice, dtype: mx.Dtype, decode: Decode = decode
) -> mx.array:
    """All tokens of some KV heads (B, heads, T, D) in the basis, means put back.

    Args:
        side: Keys or values.
        heads: Which KV heads.
        dtype: Of the result; arithmetic is float32.
        decode: What decodes the packed tokens.
    """
    basis = side.basis.of_heads(heads)
    parts = []
    if side.sink is not None:
        parts.append(basis.encode(side.sink[:, heads]).astype(dtype))
    if side.packed is not None:
        packed = decode(side, heads, dtype)
        if side.means is not None:
            means = side.means.of_tokens(0, side.packed_length, heads)
            packed = (packed.astype(mx.float32) + means).astype(dtype)
        parts.append(packed)
    if side.recent.shape[2]:
        parts.append(basis.encode(side.recent[:, heads]).astype(dtype))
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _mask_heads(mask: mx.array | str | None, heads: slice) -> mx.array | str | None:
    if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] > 1:
        return mask[:, heads]
    return mask

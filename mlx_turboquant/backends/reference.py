"""Attention over segments in plain mx: runs anywhere, and defines what is correct.

Owns decoding for attention, its memory bound, and the change of basis around it: q is
rotated once, the output un-rotated once.

A slice of KV heads at a time is decoded and handed to MLX's own attention, so the
transient never exceeds `SLICE_BYTES` or one KV head, whichever is more: for a model
with 32 layers of 8 heads, one head is 1/256 of the uncompressed cache.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..codecs import Codec
from ..codes import PackedCodes
from ..segments import Segments

#: Bound on the decoded slice and the intermediates of decoding it.
SLICE_BYTES = 256 << 20
# uint8 codes, float32 levels and product, the result and its concatenation: what MLX's
# allocator was seen to hold at once for float32 models.
_BYTES_PER_ELEMENT = 20

Decode = Callable[[Segments, slice, mx.Dtype], mx.array]


def decode(side: Segments, heads: slice, dtype: mx.Dtype) -> mx.array:
    """The packed tokens of some heads as vectors (B, heads, T_p, D), rotated."""
    assert side.packed is not None
    return side.codec.decode(side.packed, dtype, heads)


def rotate(
    keys: mx.array, values: mx.array, codecs: tuple[Codec, Codec]
) -> tuple[mx.array, mx.array]:
    """New keys and values (B, H, N, D) into their codecs' bases; dtype kept."""
    return (
        codecs[0].rotation.forward(keys).astype(keys.dtype),
        codecs[1].rotation.forward(values).astype(values.dtype),
    )


def encode(
    keys_rot: mx.array,
    values_rot: mx.array,
    mean: mx.array | None,
    codecs: tuple[Codec, Codec],
) -> tuple[PackedCodes, PackedCodes]:
    """Codes of rotated keys, less their mean (B, H, 1, Dk) float32, and values."""
    if mean is not None:
        keys_rot = keys_rot.astype(mx.float32) - mean
    return codecs[0].encode(keys_rot), codecs[1].encode(values_rot)


def attend(
    q: mx.array,
    keys: Segments,
    values: Segments,
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
    q_rot = keys.codec.rotation.forward(q).astype(q.dtype)
    out_rot = attend_rot(q_rot, keys, values, scale, mask, sinks, decode)
    return values.codec.rotation.inverse(out_rot).astype(q.dtype)


def attend_rot(
    q_rot: mx.array,
    keys: Segments,
    values: Segments,
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
                # Shift invariance lets the key mean go, unless a learned sink logit
                # that has no mean in it shares the softmax.
                materialize(keys, kv, q_rot.dtype, sinks is None, decode),
                materialize(values, kv, q_rot.dtype, True, decode),
                scale=scale,
                mask=_mask_heads(mask, q_heads),
                sinks=None if sinks is None else sinks[q_heads],
            )
        )
    return mx.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def heads_per_slice(keys: Segments, values: Segments) -> int:
    """KV heads decoded at once: as many as fit in `SLICE_BYTES`, at least one."""
    batch, heads, length, k_dim = keys.shape
    per_head = batch * length * (k_dim + values.shape[-1]) * _BYTES_PER_ELEMENT
    return max(1, min(heads, SLICE_BYTES // per_head))


def materialize(
    side: Segments,
    heads: slice,
    dtype: mx.Dtype,
    centered: bool = True,
    decode: Decode = decode,
) -> mx.array:
    """All tokens of some heads as vectors (B, heads, T, D), rotated.

    Args:
        side: Keys or values.
        heads: Which KV heads.
        dtype: Of the result; arithmetic is float32.
        centered: Leave the key mean out (the basis of the codes), or put it back.
        decode: What decodes the packed tokens.
    """
    mean = None if side.mean is None else side.mean[:, heads]
    parts = []
    if side.sink is not None:
        parts.append(_shift(side.sink[:, heads], mean if centered else None, dtype))
    if side.packed is not None:
        packed = decode(side, heads, dtype)
        if mean is not None and not centered:
            packed = (packed.astype(mx.float32) + mean).astype(dtype)
        parts.append(packed)
    parts.append(_shift(side.recent[:, heads], mean if centered else None, dtype))
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _shift(x: mx.array, mean: mx.array | None, dtype: mx.Dtype) -> mx.array:
    return (x if mean is None else x.astype(mx.float32) - mean).astype(dtype)


def _mask_heads(mask: mx.array | str | None, heads: slice) -> mx.array | str | None:
    if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] > 1:
        return mask[:, heads]
    return mask

"""Attention over segments in plain mx: runs anywhere, and defines what is correct.

Owns decoding for attention and its memory bound. Works in the rotated basis only;
`attention.attend` is what enters and leaves it.

A slice of KV heads at a time is decoded and handed to MLX's own attention, so the
transient never exceeds `SLICE_BYTES` or one KV head, whichever is more: for a model
with 32 layers of 8 heads, one head is 1/256 of the uncompressed cache.
"""

from __future__ import annotations

import mlx.core as mx

from ..segments import Segments

#: Bound on the decoded slice and the intermediates of decoding it.
SLICE_BYTES = 256 << 20
# uint8 codes, float32 levels and product, the result and its concatenation: what MLX's
# allocator was seen to hold at once for float32 models.
_BYTES_PER_ELEMENT = 20


def attend_rot(
    q_rot: mx.array,
    keys: Segments,
    values: Segments,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Softmax attention of rotated queries over sink, packed and recent tokens.

    Args:
        q_rot: (B, Hq, L, Dk), in the keys' basis. Hq is a multiple of H.
        keys: H heads, T tokens.
        values: H heads, T tokens, Dv elements.
        scale: Factor on the logits.
        mask: None, ``"causal"`` (last query sees all), or a bool or additive array
            that broadcasts to (B, Hq, L, T).
        sinks: Learned sink logits (Hq,), or None.

    Returns:
        (B, Hq, L, Dv) in q_rot's dtype, in the values' basis.
    """
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
                materialize(keys, kv, q_rot.dtype, centered=sinks is None),
                materialize(values, kv, q_rot.dtype),
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
    side: Segments, heads: slice, dtype: mx.Dtype, centered: bool = True
) -> mx.array:
    """All tokens of some heads as vectors (B, heads, T, D), rotated.

    Args:
        side: Keys or values.
        heads: Which KV heads.
        dtype: Of the result; arithmetic is float32.
        centered: Leave the key mean out (the basis of the codes), or put it back.
    """
    mean = None if side.mean is None else side.mean[:, heads]
    parts = []
    if side.sink is not None:
        parts.append(_shift(side.sink[:, heads], mean if centered else None, dtype))
    if side.packed is not None:
        packed = side.codec.decode(side.packed, dtype, heads)
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

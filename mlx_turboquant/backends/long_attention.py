"""Attention of many queries at once on MLX's CPU device: a prompt's later chunks.

MLX's own makes all logits of all heads, masks them and takes 9 ns for the softmax of
each. Here some queries of one KV head at a time are multiplied with the tokens they may
see, and the softmax is `exponential`'s. Arithmetic is float32.
"""

from __future__ import annotations

import mlx.core as mx

from ..pacing import pace
from .call import AttendCall, Mask
from .exponential import softmax_of_parts
from .reference import Reference

#: Logits at a time, of the queries of one KV head: 2 MB stay in a cache.
_LOGITS = 1 << 19

#: Finite: a row that sees nothing, as of padding, must not become NaN.
_UNSEEN = -1e30

#: Tokens, and a mask that broadcasts to (B, G, n, tokens) or None.
Part = tuple[slice, mx.array | None]


def attend_long(call: AttendCall, backend: Reference) -> mx.array:
    """As `Reference.attend`; ``backend`` decodes, one KV head at a time."""
    q, keys, values = call.q, call.keys, call.values
    batch, query_heads, length, _ = q.shape
    kv_heads, total = keys.shape[1:3]
    group = query_heads // kv_heads
    mask = call.mask
    if isinstance(mask, mx.array):
        mask = mx.broadcast_to(mask, (batch, query_heads, length, total))
    q = q.astype(mx.float32) * call.scale
    q_rot = keys.quantizer.transform.encode_query(q)
    step = max(1, min(length, _LOGITS // (batch * group * total)))
    outputs = []
    for head in range(kv_heads):
        own, heads = slice(head, head + 1), slice(head * group, (head + 1) * group)
        k_rot = backend.materialize_rot(keys, own, mx.float32)
        v_rot = backend.materialize_rot(values, own, mx.float32)
        sinks = None if call.sink_logits is None else call.sink_logits[heads]
        own_mask = mask[:, heads] if isinstance(mask, mx.array) else mask
        blocks = []
        for first in range(0, length, step):
            rows = slice(first, min(first + step, length))
            parts = _seen(own_mask, rows, length, total)
            blocks.append(
                _attend_block(q_rot[:, heads, rows], k_rot, v_rot, parts, sinks)
            )
            if step < length:
                pace(blocks[-1:])
        outputs.append(mx.concatenate(blocks, axis=2))
    out = values.quantizer.transform.decode(mx.concatenate(outputs, axis=1))
    return out.astype(call.q.dtype)


def _seen(mask: Mask, rows: slice, length: int, total: int) -> list[Part]:
    """What queries ``rows`` of the last ``length`` of all tokens see."""
    if mask is None:
        return [(slice(0, total), None)]
    if isinstance(mask, mx.array):
        return [(slice(0, total), mask[..., rows, :])]
    # All see what came before the block; in it, each sees up to itself.
    start, stop = total - length + rows.start, total - length + rows.stop
    place = mx.arange(stop - start)
    own: Part = (slice(start, stop), place <= place[:, None])
    return [(slice(0, start), None), own] if start else [own]


def _attend_block(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    parts: list[Part],
    sink_logits: mx.array | None,
) -> mx.array:
    """Some queries (B, G, n, Dk) of one KV head: (B, G, n, Dv).

    Args:
        q: The queries, scaled.
        k: All keys of the head (B, 1, T, Dk).
        v: All values of the head (B, 1, T, Dv).
        parts: What they see.
        sink_logits: Learned logits (G,), or None.
    """
    batch, group, count, dim = q.shape
    q = q.reshape(batch, 1, group * count, dim)
    logits = []
    for tokens, mask in parts:
        some = q @ k[:, :, tokens].swapaxes(-1, -2)
        some = some.reshape(batch, group, count, -1)
        if mask is not None:
            some = masked(some, mask)
        logits.append(some)
    weights, divisor = softmax_of_parts(logits, sink_logits)
    out = mx.zeros((batch, 1, group * count, v.shape[-1]))
    for (tokens, _), some in zip(parts, weights, strict=True):
        out = mx.addmm(out, some.reshape(batch, 1, group * count, -1), v[:, :, tokens])
    return out.reshape(batch, group, count, -1) / divisor


def masked(logits: mx.array, mask: mx.array) -> mx.array:
    """Logits with a bool mask (True is seen) or an additive one."""
    if mask.dtype == mx.bool_:
        return mx.where(mask, logits, _UNSEEN)
    return logits + mask.astype(mx.float32)

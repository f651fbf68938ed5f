"""`attend`: attention over what a cache returned.

Validates, hides tokens that left a window, and loops over the rows of a ragged batch
where its backend does not take them at once.
The arithmetic, and with it the change of basis (q into it, the output out of it), is
the `attend` of the cache's backend. Nothing here writes to a cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import mlx.core as mx

from .backends import select
from .backends.call import AttendCall, BatchCall, Mask
from .backends.reference import Reference
from .batch_handles import CompressedBatch, CompressedGroups, CompressedRows
from .errors import UnsupportedModelError
from .segments import CompressedKV, CompressedTokens


def attend(
    q: mx.array,
    keys: CompressedKV | mx.array,
    values: CompressedKV | mx.array,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention over compressed keys and values.

    Args:
        q: Queries (B, Hq, L, Dk), model dtype, not rotated, not scaled.
        keys: What ``update_and_fetch`` returned; plain arrays pass to MLX.
        values: The values that it returned with them.
        scale: Factor on the logits, usually Dk**-0.5.
        mask: None, ``"causal"``, a bool array (True attends) or an additive array,
            broadcastable to (B, Hq, L, T).
        sinks: Learned sink logits (Hq,) that join the softmax with no value.

    Returns:
        (B, Hq, L, Dv) in q's dtype.

    Raises:
        ValueError: if q's heads or dim do not fit the keys', or the mask is text
            other than ``"causal"``.
    """
    if isinstance(keys, CompressedTokens) and isinstance(values, CompressedTokens):
        _check(q, keys, mask)
        call = AttendCall(q, keys, values, scale, mask, sinks)
        if keys.hidden[1]:
            call = _without_hidden(call)
        if keys.packed is None:
            return mx.fast.scaled_dot_product_attention(
                q,
                keys.recent_tokens,
                values.recent_tokens,
                scale=scale,
                mask=call.mask,
                sinks=sinks,
            )
        backend = keys.backend
        if backend is None:
            backend = _resolved(keys, values)
        out: mx.array = backend.attend(call)
        return out
    if isinstance(keys, CompressedBatch) and isinstance(values, CompressedBatch):
        _check(q, keys, mask)
        at_once: mx.array | None = keys.backend.attend_batch(
            BatchCall(q, keys, values, scale, mask, sinks)
        )
        if at_once is not None:
            return at_once
        spans = [(0, q.shape[2])] * q.shape[0]
        keys, values = (CompressedRows(side.alone(), spans) for side in (keys, values))
    if isinstance(keys, CompressedGroups) and isinstance(values, CompressedGroups):
        return _attend_groups(q, keys, values, scale, mask, sinks)
    if isinstance(keys, CompressedRows) and isinstance(values, CompressedRows):
        return _attend_rows(q, keys, values, scale, mask, sinks)
    return mx.fast.scaled_dot_product_attention(
        q,
        cast(mx.array, keys),
        cast(mx.array, values),
        scale=scale,
        mask=mask,
        sinks=sinks,
    )


def _check(q: mx.array, keys: CompressedTokens | CompressedBatch, mask: Mask) -> None:
    """Raise ValueError if queries do not fit keys, or the mask is unknown text."""
    batch, heads, _, dim = keys.recent.shape
    shape = q.shape
    if len(shape) != 4 or shape[0] != batch or shape[1] % heads or shape[3] != dim:
        raise ValueError(
            f"queries {tuple(shape)} do not fit keys {keys.shape}: want "
            f"({batch}, a multiple of {heads}, L, {dim})"
        )
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask {mask!r} is unknown; use None, 'causal' or an array")


def _without_hidden(call: AttendCall) -> AttendCall:
    """The same call over all stored tokens, with a mask that hides the hidden ones."""
    keys, values, mask = call.keys, call.values, call.mask
    (first, count), shown, steps = keys.hidden, keys.shape[2], call.q.shape[2]
    if not isinstance(mask, mx.array):
        last = mx.arange(shown - steps, shown)[:, None]
        causal = isinstance(mask, str)
        mask = mx.arange(shown) <= last if causal else mx.ones((1, shown), mx.bool_)
    off = mx.array(False if mask.dtype == mx.bool_ else -mx.inf, mask.dtype)
    mask = mx.broadcast_to(mask, (*mask.shape[:-1], shown))
    hidden = mx.broadcast_to(off, (*mask.shape[:-1], count))
    mask = mx.concatenate([mask[..., :first], hidden, mask[..., first:]], axis=-1)
    return call._replace(
        keys=replace(keys, hidden=(0, 0)),
        values=replace(values, hidden=(0, 0)),
        mask=mask,
    )


def dequantize(
    keys: CompressedTokens, values: CompressedTokens
) -> tuple[mx.array, mx.array]:
    """Keys (B, H, T, Dk) and values (B, H, T, Dv) as a model's own code wants them.

    This is for attention that is not mlx-lm's function. All of a layer is decoded at
    once, in the model's dtype and basis; hidden tokens are left out.
    """
    backend = keys.backend or _resolved(keys, values)
    return _shown(backend.dequantize(keys), keys), _shown(
        backend.dequantize(values), values
    )


def _resolved(keys: CompressedTokens, values: CompressedTokens) -> Reference:
    return select.resolve(keys.quantizer, values.quantizer, keys.dtype).backend


def _shown(x: mx.array, side: CompressedTokens) -> mx.array:
    first, count = side.hidden
    if not count:
        return x
    return mx.concatenate([x[:, :, :first], x[:, :, first + count :]], axis=2)


def _attend_groups(
    q: mx.array,
    keys: CompressedGroups,
    values: CompressedGroups,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
) -> mx.array:
    """Each group at once; then the rows in their order."""
    outputs: list[mx.array] = []
    order: list[int] = []
    for (rows, k), (_, v) in zip(keys.parts, values.parts, strict=True):
        some, own_mask = mx.array(list(rows)), mask
        if isinstance(mask, mx.array):
            own_mask = _mask_of_rows(mask, some, slice(None), k.shape[2])
        outputs.append(attend(q[some], k, v, scale, own_mask, sinks))
        order += rows
    places = sorted(range(len(order)), key=order.__getitem__)
    return mx.concatenate(outputs)[mx.array(places)]


def _attend_rows(
    q: mx.array,
    keys: CompressedRows,
    values: CompressedRows,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
) -> mx.array:
    """Each row on its own; padded queries get zeros."""
    longest = max(stop for _, stop in keys.spans)
    if q.shape[0] != len(keys.rows) or q.shape[2] < longest:
        raise UnsupportedModelError(
            f"this model's code takes single rows out of a batch: queries "
            f"{tuple(q.shape)} are not those of {len(keys.rows)} rows of {longest} "
            "tokens",
            "give prompts of one length, or one at a time",
        )
    outputs = []
    for row, (k, v, (start, stop)) in enumerate(
        zip(keys.rows, values.rows, keys.spans, strict=True)
    ):
        if stop <= start:
            outputs.append(mx.zeros((1, *q.shape[1:3], v.shape[-1]), q.dtype))
            continue
        rows, steps, row_mask = slice(row, row + 1), slice(start, stop), mask
        if isinstance(mask, mx.array):
            row_mask = _mask_of_rows(mask, rows, steps, k.shape[2])
        own = q[rows, :, steps]
        out = attend(own, k, v, scale, row_mask, sinks)
        outside = (start, q.shape[2] - stop)
        if any(outside):
            out = mx.pad(out, [(0, 0), (0, 0), outside, (0, 0)])
        outputs.append(out)
    return mx.concatenate(outputs, axis=0)


def _mask_of_rows(
    mask: mx.array, rows: slice | mx.array, steps: slice, length: int
) -> mx.array:
    """Some rows of a mask whose columns are right-aligned, as with left padding."""
    if mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[rows]
    if mask.shape[-2] > 1:
        mask = mask[..., steps, :]
    return mask[..., -length:]

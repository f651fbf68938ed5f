"""`attend`: attention over what a cache returned; `decoded`: the arrays it stands for.

Owns validation, hidden tokens and the loop over rows of a ragged batch. The
arithmetic, and with it the change of basis (q into it, the output out of it), is the
`attend` of the backend that `backends.select` chooses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import mlx.core as mx

from .backends import select
from .backends.reference import Decode
from .segments import CompressedKV, CompressedRows, CompressedTokens

Mask = mx.array | str | None


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
        values: Likewise.
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
    if isinstance(keys, CompressedRows) and isinstance(values, CompressedRows):
        return _attend_rows(q, keys, values, scale, mask, sinks)
    if not (
        isinstance(keys, CompressedTokens) and isinstance(values, CompressedTokens)
    ):
        keys, values = cast(mx.array, keys), cast(mx.array, values)
        return mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    _check(q, keys, mask)
    if keys.hidden[1]:
        mask = _hiding(mask, keys, q.shape[2])
        keys, values = replace(keys, hidden=(0, 0)), replace(values, hidden=(0, 0))
    backend, _ = select.choose(keys, values)
    return backend.attend(q, keys, values, scale, mask, sinks)


def _check(q: mx.array, keys: CompressedTokens, mask: Mask) -> None:
    batch, heads, _, dim = keys.shape
    if q.ndim != 4 or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != dim:
        raise ValueError(
            f"queries {tuple(q.shape)} do not fit keys {keys.shape}: want "
            f"({batch}, a multiple of {heads}, L, {dim})"
        )
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask {mask!r} is unknown; use None, 'causal' or an array")


def _hiding(mask: Mask, keys: CompressedTokens, steps: int) -> mx.array:
    """A mask over all stored tokens from one over those that are not hidden."""
    (first, count), shown = keys.hidden, keys.shape[2]
    if not isinstance(mask, mx.array):
        last = mx.arange(shown - steps, shown)[:, None]
        causal = isinstance(mask, str)
        mask = mx.arange(shown) <= last if causal else mx.ones((1, shown), mx.bool_)
    off = mx.array(False if mask.dtype == mx.bool_ else -mx.inf, mask.dtype)
    mask = mx.broadcast_to(mask, (*mask.shape[:-1], shown))
    hidden = mx.broadcast_to(off, (*mask.shape[:-1], count))
    parts = [mask[..., :first], hidden, mask[..., first:]]
    return mx.concatenate(parts, axis=-1)


def decoded(
    keys: CompressedTokens, values: CompressedTokens
) -> tuple[mx.array, mx.array]:
    """Keys (B, H, T, Dk) and values (B, H, T, Dv) as a model's own code wants them.

    For attention that is not mlx-lm's function. All of a layer is decoded at once, in
    the model's dtype and basis; hidden tokens are left out.
    """
    backend, _ = select.choose(keys, values)
    return _decoded(keys, backend.decode), _decoded(values, backend.decode)


def _decoded(side: CompressedTokens, decode: Decode) -> mx.array:
    parts = [] if side.sink is None else [side.sink]
    if side.packed is not None:
        packed_rot = decode(side, slice(None), mx.float32)
        if side.means is not None:
            packed_rot = packed_rot + side.means.of_tokens(0, side.packed_length)
        parts.append(side.basis.decode(packed_rot).astype(side.dtype))
    whole = mx.concatenate([*parts, side.recent], axis=2) if parts else side.recent
    first, count = side.hidden
    if not count:
        return whole
    shown = [whole[:, :, :first], whole[:, :, first + count :]]
    return mx.concatenate(shown, axis=2)


def _attend_rows(
    q: mx.array,
    keys: CompressedRows,
    values: CompressedRows,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
) -> mx.array:
    """Each row on its own; padded queries get zeros."""
    outputs = []
    for row, (k, v, (start, stop)) in enumerate(
        zip(keys.rows, values.rows, keys.spans, strict=True)
    ):
        if stop <= start:
            outputs.append(mx.zeros((1, *q.shape[1:3], v.shape[-1]), q.dtype))
            continue
        row_mask = mask
        if isinstance(mask, mx.array):
            row_mask = _mask_row(mask, row, start, stop, k.shape[2])
        own = q[row : row + 1, :, start:stop]
        out = attend(own, k, v, scale, row_mask, sinks)
        outside = (start, q.shape[2] - stop)
        if any(outside):
            out = mx.pad(out, [(0, 0), (0, 0), outside, (0, 0)])
        outputs.append(out)
    return mx.concatenate(outputs, axis=0)


def _mask_row(mask: mx.array, row: int, start: int, stop: int, length: int) -> mx.array:
    """One row of a mask whose columns are right-aligned, as with left padding."""
    if mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[row : row + 1]
    if mask.shape[-2] > 1:
        mask = mask[..., start:stop, :]
    return mask[..., -length:]

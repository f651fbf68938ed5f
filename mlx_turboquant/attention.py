"""`attend`: attention over whatever a cache returned.

Owns validation and the loop over rows of a ragged batch. The arithmetic, and with it
the change of basis (q into it, the output out of it), is the `attend` of the backend
that `backends.select` chooses.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from .backends import select
from .segments import Handle, RowSegments, Segments

Mask = mx.array | str | None


def attend(
    q: mx.array,
    keys: Handle | mx.array,
    values: Handle | mx.array,
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
    if isinstance(keys, RowSegments) and isinstance(values, RowSegments):
        return _attend_rows(q, keys, values, scale, mask, sinks)
    if not (isinstance(keys, Segments) and isinstance(values, Segments)):
        keys, values = cast(mx.array, keys), cast(mx.array, values)
        return mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    _check(q, keys, mask)
    backend, _ = select.choose(keys, values)
    out = backend.attend(q, keys, values, scale, mask, sinks)
    if keys.observe is not None:
        keys.observe(q, scale)
    return out


def _check(q: mx.array, keys: Segments, mask: Mask) -> None:
    batch, heads, _, dim = keys.shape
    if q.ndim != 4 or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != dim:
        raise ValueError(
            f"queries {tuple(q.shape)} do not fit keys {keys.shape}: want "
            f"({batch}, a multiple of {heads}, L, {dim})"
        )
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask {mask!r} is unknown; use None, 'causal' or an array")


def _attend_rows(
    q: mx.array,
    keys: RowSegments,
    values: RowSegments,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
) -> mx.array:
    """Each row on its own; padded queries get zeros."""
    outputs = []
    for row, (k, v, steps) in enumerate(
        zip(keys.rows, values.rows, keys.steps, strict=True)
    ):
        pad = q.shape[2] - steps
        if steps == 0:
            outputs.append(mx.zeros((1, q.shape[1], pad, v.shape[-1]), q.dtype))
            continue
        row_mask = mask
        if isinstance(mask, mx.array):
            row_mask = _mask_row(mask, row, steps, k.shape[2])
        out = attend(q[row : row + 1, :, :steps], k, v, scale, row_mask, sinks)
        outputs.append(mx.pad(out, [(0, 0), (0, 0), (0, pad), (0, 0)]) if pad else out)
    return mx.concatenate(outputs, axis=0)


def _mask_row(mask: mx.array, row: int, steps: int, length: int) -> mx.array:
    """One row of a mask whose columns are right-aligned, as with left padding."""
    if mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[row : row + 1]
    if mask.shape[-2] > 1:
        mask = mask[..., :steps, :]
    return mask[..., -length:]

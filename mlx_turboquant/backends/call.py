"""What backends take: one attention of a cache, or of several sequences at once."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..batch_handles import CompressedBatch
from ..segments import CompressedTokens

Mask = mx.array | str | None


class AttendCall(NamedTuple):
    """Arguments of one attention; checked, and with something packed.

    Attributes:
        q: Queries (B, Hq, L, Dk), model dtype, not rotated, not scaled. Hq is a
            multiple of H.
        keys: H heads, T tokens, none of them hidden.
        values: H heads, T tokens, Dv elements.
        scale: Factor on the logits.
        mask: None, ``"causal"`` (the last query sees all), or a bool or additive array
            that broadcasts to (B, Hq, L, T).
        sink_logits: Learned logits (Hq,) that join the softmax with no value, or None.
    """

    q: mx.array
    keys: CompressedTokens
    values: CompressedTokens
    scale: float
    mask: Mask = None
    sink_logits: mx.array | None = None


class BatchCall(NamedTuple):
    """Arguments of one attention of several sequences; checked.

    Attributes:
        q: As `AttendCall.q`.
        keys: Of each row; the longest shows T tokens.
        values: Of each row.
        scale: Factor on the logits.
        mask: None, ``"causal"`` (of every row the last query sees all), or a bool or
            additive array that broadcasts to (B, Hq, L, T), whose last columns are a
            row's tokens.
        sink_logits: As `AttendCall.sink_logits`.
    """

    q: mx.array
    keys: CompressedBatch
    values: CompressedBatch
    scale: float
    mask: Mask = None
    sink_logits: mx.array | None = None


def in_numbers(mask: Mask, q: mx.array) -> Mask:
    """A bool mask in numbers: MLX's attention on CUDA would make them for each head."""
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_:
        # Finite: a row that sees nothing, as of padding, must not become NaN.
        seen, unseen = (mx.array(x, q.dtype) for x in (0, mx.finfo(q.dtype).min))
        return mx.where(mask, seen, unseen)
    return mask

"""The one number stored besides a vector's codes: rules for choosing it.

With y the vector over its root mean square (so ||y||^2 = dim), c the codeword and s the
stored scale over that root mean square, the decoder returns s * c:

    plain          s = 1                     the vector's own norm (TurboQuant)
    norm           s = ||y|| / ||c||         what is decoded has the vector's norm
    least-squares  s = <y, c> / ||c||^2      smallest error (DRIVE, EDEN: "biased")
    unbiased       s = ||y||^2 / <y, c>      unbiased over rotations (EDEN: "unbiased")

Sources: DRIVE (arXiv 2105.08339), EDEN (arXiv 2108.08842), and their comparison with
TurboQuant (arXiv 2604.18555).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import mlx.core as mx

if TYPE_CHECKING:
    from .base import Side

Rule = Literal["plain", "norm", "least-squares", "unbiased"]
#: In the order by which ``metal/encode_scalar.metal`` numbers them.
RULES: tuple[Rule, ...] = ("plain", "norm", "least-squares", "unbiased")
#: Bits of a stored fp16 number.
FP16_BITS = 16
_FP16_MAX = 65504.0


def default_scale_rule(side: Side) -> Rule:
    """Keys keep their norm, so that logits do not shrink; values have least error."""
    return "norm" if side == "keys" else "least-squares"


def rms_normalize(x: mx.array, axis: int = -1) -> tuple[mx.array, mx.array]:
    """Divide x (..., D) float32 by its root mean square (..., 1); returns both.

    ``axis`` is that of D.
    """
    rms = mx.sqrt(mx.mean(x * x, axis=axis, keepdims=True))
    return x / mx.where(rms > 0, rms, 1.0), rms


def scale_from_products(
    rule: Rule, rms: mx.array, dim: int, dot: mx.array, code_sq: mx.array
) -> mx.array:
    """The scale to store, fp16 (..., 1).

    Args:
        rule: Which rule.
        rms: Root mean square of each vector, (..., 1).
        dim: Elements per vector.
        dot: <y, c>, (..., 1).
        code_sq: ||c||^2, (..., 1).
    """
    if rule == "plain":
        scale = rms
    elif rule == "norm":
        scale = rms * mx.sqrt(dim / mx.maximum(code_sq, 1e-30))
    elif rule == "least-squares":
        scale = rms * dot / mx.maximum(code_sq, 1e-30)
    else:
        scale = rms * dim / mx.maximum(dot, 1e-30)
    return clip_to_fp16(scale)


def scale_from_vectors(rule: Rule, rms: mx.array, y: mx.array, c: mx.array) -> mx.array:
    """`scale_from_products` of vectors y and codewords c, both (..., D)."""
    dot = mx.sum(y * c, axis=-1, keepdims=True)
    code_sq = mx.sum(c * c, axis=-1, keepdims=True)
    return scale_from_products(rule, rms, y.shape[-1], dot, code_sq)


def clip_to_fp16(x: mx.array) -> mx.array:
    """Convert to float16, the largest finite number where it would be infinite."""
    return mx.clip(x, -_FP16_MAX, _FP16_MAX).astype(mx.float16)

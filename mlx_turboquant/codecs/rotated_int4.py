"""Rotated int4: Hadamard rotation, then 4-bit integers with a scale per token.

Owns the choice of codes. Levels are the 16 odd multiples of half a step, the step is
set by the vector's largest coordinate. What fused int4 caches for Apple silicon store;
here it is read by the same kernels as `turboquant`, with a polynomial of one term.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..packing import pack
from ..rotation import rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from .base import Side, register
from .scalar import ScalarCodec
from .scale import fp16

_BITS = 4
_LEVELS = 2**_BITS


@dataclass(frozen=True, eq=False)
class RotatedInt4(ScalarCodec):
    """See the module's docstring; implements `codecs.base.Codec`."""

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (B, H, T, W) uint32, steps fp16."""
        x_rot = x_rot.astype(mx.float32)
        largest = mx.max(mx.abs(x_rot), axis=-1, keepdims=True)
        step = fp16(largest * (2 / (_LEVELS - 1)))
        wide = step.astype(mx.float32)
        codes = mx.floor(x_rot / mx.where(wide > 0, wide, 1.0)) + _LEVELS // 2
        words = pack(mx.clip(codes, 0, _LEVELS - 1).astype(mx.uint32), _BITS)
        return TokenArrays({"words": words, "scales": step}, x_rot.shape[-2])


@register("rotated-int4")
def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> RotatedInt4:
    # A level is (code - 7.5) steps: `_LEVELS` times the polynomial's u.
    return RotatedInt4(spec, dim, rotation_for(dim, seed), _BITS, (float(_LEVELS),))

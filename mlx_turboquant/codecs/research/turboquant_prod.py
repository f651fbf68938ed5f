"""TurboQuant-prod: one bit less of TurboQuant, and a sign sketch of what it leaves.

Inner products with what is decoded are unbiased (over the sketch's seed), at the price
of more noise: the residual's sketch adds pi / 2 - 1 times its square norm.

Source: TurboQuant (arXiv 2504.19874), Algorithm 2 and Theorem 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ...packing import words_per_vector
from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..registry import CodecInfo, register_codec
from ..scale_rules import FP16_BITS
from ..turboquant import TurboQuant, turboquant
from .sketch import from_sketch, sketch_of
from .turboquant_scales import PLAIN_GAINS


@dataclass(frozen=True, eq=False)
class TurboQuantProd(Codec):
    """See the module's docstring.

    Args:
        base: TurboQuant of one bit less, by the paper's plain rule.
        seed: Seed of the sketch.
    """

    base: TurboQuant
    seed: int
    arrays = ("words", "scales", "signs", "lengths")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words, scales, signs (one bit each), lengths."""
        x_rot = x_rot.astype(mx.float32)
        codes = self.base.encode(x_rot)
        remainder = x_rot - self.base.decode(codes, mx.float32)
        signs, lengths = sketch_of(remainder, self.dim, self.seed)
        return TokenArrays({**codes.arrays, "signs": signs, "lengths": lengths})

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Both parts of every token in use: (B, heads, length, dim), still rotated."""
        signs, lengths = codes.view("signs", heads), codes.view("lengths", heads)
        remainder = from_sketch(signs, lengths, self.dim, self.dim, self.seed)
        return (self.base.decode(codes, mx.float32, heads) + remainder).astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """Words, signs and two fp16 numbers; d=128 at 3 bits: 416, or 3.25 each."""
        sketch = 32 * words_per_vector(1, self.dim) + FP16_BITS
        return self.base.bits_per_vector + sketch


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TurboQuantProd:
    rotation = rotation_for(dim, seed)
    base = turboquant(spec, dim, int(spec.bits) - 1, rotation, "plain", PLAIN_GAINS)
    return TurboQuantProd(spec, dim, rotation, base, seed)


register_codec(CodecInfo("research.turboquant-prod", tuple(range(2, 9)), _build))

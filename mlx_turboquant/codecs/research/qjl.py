"""QJL: the signs of a random projection of each key, and its norm. Keys only.

Inner products with queries are unbiased over seeds. ``bits`` projections are kept per
element. The projection and its inverse are `sketch`'s.

Source: QJL (arXiv 2406.03482), equation 4. The paper keeps outlier channels apart and
quantizes values otherwise; here values take another codec, `turboquant` by default.
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
from .sketch import from_sketch, sketch_of


@dataclass(frozen=True, eq=False)
class Qjl(Codec):
    """See the module's docstring.

    Args:
        rows: How many projections, one bit each.
        seed: Seed of the projection.
    """

    rows: int
    seed: int
    arrays = ("words", "lengths")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to packed signs and fp16 lengths."""
        words, lengths = sketch_of(x_rot.astype(mx.float32), self.rows, self.seed)
        return TokenArrays({"words": words, "lengths": lengths})

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Vectors whose inner products are QJL's: (B, heads, length, dim)."""
        words, lengths = codes.view("words", heads), codes.view("lengths", heads)
        x = from_sketch(words, lengths, self.rows, self.dim, self.seed)
        return x.astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """Signs and one fp16 length; d=128 at 3 bits: 400, or 3.125 an element."""
        return 32 * words_per_vector(1, self.rows) + FP16_BITS


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Qjl:
    rotation = rotation_for(dim, seed, "identity")
    return Qjl(spec, dim, rotation, int(spec.bits) * dim, seed)


register_codec(CodecInfo("research.qjl", tuple(range(1, 9)), _build, keys_only=True))

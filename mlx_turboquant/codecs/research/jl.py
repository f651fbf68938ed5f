"""JL: each key projected to fewer dims, kept in fp16. Keys only.

Rows of the projection are the first ones of a random rotation, times dim / rows so that
inner products are unbiased over seeds. With ``bits`` an element, dim * bits / 16 of
them fit.

Source: Johnson and Lindenstrauss, through Li, Hastie and Church, "Very sparse random
projections"; a randomized Hadamard matrix in place of a Gaussian one has less noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..registry import CodecInfo, register_codec
from ..scale_rules import FP16_BITS, clip_to_fp16


@dataclass(frozen=True, eq=False)
class Jl(Codec):
    """See the module's docstring.

    Args:
        rows: How many projections are kept.
    """

    rows: int
    arrays = ("vectors",)

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Rotated vectors (B, H, T, dim) to their first ``rows`` elements, fp16."""
        return TokenArrays({"vectors": clip_to_fp16(x_rot[..., : self.rows])})

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Zeros beyond the rows: (B, heads, length, dim), still rotated."""
        kept = codes.view("vectors", heads).astype(mx.float32) * (self.dim / self.rows)
        tail = [(0, 0)] * 3 + [(0, self.dim - self.rows)]
        return mx.pad(kept, tail).astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """fp16 numbers; d=128 at 4 bits: 32 of them."""
        return FP16_BITS * self.rows


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Jl:
    rows = max(1, int(spec.bits) * dim // FP16_BITS)
    return Jl(spec, dim, rotation_for(dim, seed), rows)


register_codec(CodecInfo("research.jl", tuple(range(1, 9)), _build, keys_only=True))

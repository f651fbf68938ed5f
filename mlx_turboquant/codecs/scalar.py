"""`ScalarCodec`: codes of single coordinates, one scale a vector, levels by polynomial.

Owns what such codecs share: their arrays, decoding and bit count. How codes and scales
are chosen is theirs. Whatever is one, the attention kernels can read.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..packing import unpack, words_per_vector
from ..polynomial import levels_of
from ..rotation import Rotation
from ..spec import CodecSpec
from ..tokens import TokenArrays
from .base import Traits
from .scale import FP16_BITS


@dataclass(frozen=True, eq=False)
class ScalarCodec(Traits):
    """The part of `codecs.base.Codec` that needs no vectors.

    Args:
        spec: Its options.
        dim: Elements per vector.
        rotation: ChannelTransform of the vectors.
        bits: Of a code, 1..8.
        coefficients: Levels by code (`polynomial.levels_of`).
    """

    spec: CodecSpec
    dim: int
    rotation: Rotation
    bits: int
    coefficients: tuple[float, ...]
    arrays = ("words", "scales")

    def levels(self, codes: mx.array) -> mx.array:
        """Levels of codes of any integer dtype and shape, float32."""
        return levels_of(codes, self.bits, self.coefficients)

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Scale times level for every used token: (B, heads, length, dim), rotated."""
        index = unpack(codes.view("words", heads), self.bits, self.dim)
        scales = codes.view("scales", heads).astype(mx.float32)
        return (self.levels(index) * scales).astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """Words and one fp16 scale; d=128 at 3 bits: 400, or 3.125 an element."""
        return 32 * words_per_vector(self.bits, self.dim) + FP16_BITS

    @property
    def kernel_format(self):
        from .kernel_format import KernelFormat

        return KernelFormat(
            0, self.bits, len(self.coefficients), coefficients=self.coefficients
        )

"""`TableCodec`: pairs of coordinates looked up by bits of a stream, one scale a vector.

Owns what such codecs share: their arrays, decoding and bit count. How codes and scales
are chosen is theirs. Whatever is one, the attention kernels can read.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..bitstream import Stream
from ..rotation import Rotation
from ..spec import CodecSpec
from ..tokens import TokenArrays
from .base import Traits
from .scale import FP16_BITS


@dataclass(frozen=True, eq=False)
class TableCodec(Traits):
    """The part of `codecs.base.Codec` that needs no vectors.

    Args:
        spec: Its options.
        dim: Elements per vector.
        rotation: ChannelTransform of the vectors.
        pairs: Own bits of each pair of elements, padding included.
        index_bits: Bits a pair is looked up by: its own and, of a trellis, those
            behind.
        unit: What points are multiples of.
        points: (2**index_bits, 2) float32, in units.
    """

    spec: CodecSpec
    dim: int
    rotation: Rotation
    pairs: Stream
    index_bits: int
    unit: float
    points: mx.array
    arrays = ("words", "scales")

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Scale times point for every used token: (B, heads, length, dim), rotated."""
        index = self.pairs.windows(codes.view("words", heads), self.index_bits)
        scales = codes.view("scales", heads).astype(mx.float32)
        return (self.elements(index) * scales).astype(dtype)

    def elements(self, index: mx.array) -> mx.array:
        """Points of pairs (..., pairs) as (..., dim) float32."""
        points = self.points[index] * self.unit
        return points.reshape(*index.shape[:-1], -1)[..., : self.dim]

    @property
    def bits_per_vector(self) -> int:
        """Words and one fp16 scale; d=128 at 3 bits: 400, or 3.125 an element."""
        return 32 * self.pairs.words + FP16_BITS

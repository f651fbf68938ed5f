"""Codecs that store words and one fp16 scale per vector: what they share.

Subclasses choose codes and scales. Attention kernels read every codec of these kinds:
`ScalarCodec`, whose levels are a polynomial of each element's code, and `TableCodec`,
which looks pairs of elements up by bits of a stream.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass

import mlx.core as mx

from ..bitstream import BitStream
from ..packing import unpack, words_per_vector
from ..polynomial import levels_of
from ..tokens import TokenArrays
from .base import Codec
from .kernel_format import KernelFormat
from .scale_rules import FP16_BITS


@dataclass(frozen=True, eq=False)
class ScaledCodec(Codec):
    """Decodes to scale times codeword."""

    arrays = ("words", "scales")

    @property
    @abstractmethod
    def words(self) -> int:
        """uint32 words of a vector."""

    @abstractmethod
    def codewords(self, words: mx.array) -> mx.array:
        """What words (..., W) uint32 stand for before scaling: (..., dim) float32."""

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Scale times codeword of every token: (B, heads, length, dim), rotated."""
        codewords = self.codewords(codes.view("words", heads))
        scales = codes.view("scales", heads).astype(mx.float32)
        return (codewords * scales).astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """Words and one fp16 scale; d=128 at 3 bits: 400, or 3.125 an element."""
        return 32 * self.words + FP16_BITS


@dataclass(frozen=True, eq=False)
class ScalarCodec(ScaledCodec):
    """Quantizes each element on its own; ``packing`` has the layout of its words.

    Args:
        bits: Bits of an element's code, 1..8.
        coefficients: The levels' polynomial (`polynomial.levels_of`).
    """

    bits: int
    coefficients: tuple[float, ...]

    @property
    def words(self) -> int:
        """uint32 words of a vector."""
        return words_per_vector(self.bits, self.dim)

    def levels(self, codes: mx.array) -> mx.array:
        """Levels of codes of any integer dtype and shape, float32."""
        return levels_of(codes, self.bits, self.coefficients)

    def codewords(self, words: mx.array) -> mx.array:
        """Levels (..., dim) float32 of words (..., W)."""
        return self.levels(unpack(words, self.bits, self.dim))

    @functools.cached_property
    def kernel_format(self) -> KernelFormat:
        """A polynomial."""
        return KernelFormat.polynomial(self.bits, self.coefficients)


@dataclass(frozen=True, eq=False)
class TableCodec(ScaledCodec):
    """Looks up pairs of elements in a table of points in the plane.

    Args:
        pairs: The stream of each pair's own bits, padding included.
        index_bits: Bits that a pair is looked up by: its own and, for a trellis, those
            that follow.
        step: What the points are multiples of.
        points: (2**index_bits, 2) float32, in steps.
    """

    pairs: BitStream
    index_bits: int
    step: float
    points: mx.array

    @property
    def words(self) -> int:
        """uint32 words of a vector."""
        return self.pairs.words

    def codewords(self, words: mx.array) -> mx.array:
        """Points (..., dim) float32 of words (..., W)."""
        return self.points_of(self.pairs.read(words, self.index_bits))

    def points_of(self, index: mx.array) -> mx.array:
        """Points of pairs (..., pairs) as (..., dim) float32, padding cut off."""
        points = self.points[index] * self.step
        return points.reshape(*index.shape[:-1], -1)[..., : self.dim]

"""PolarQuant: blocks of 16 rotated coordinates as a radius and four levels of angles.

The first level's 8 angles go round the circle (4 bits, uniform); the 4 + 2 + 1 above
compare radii, lie in 0..pi/2 and have densities sin(2a)^(2^(l-1)-1) (2 bits,
Lloyd-Max). The block's radius is fp16: (32 + 14 + 16) / 16 = 3.875 bits an element,
with nothing besides.

Source: PolarQuant (arXiv 2502.02617), section 3 and algorithm 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...bitstream import BitStream
from ...codebook import Array, Codebook, solve_interval
from ...errors import UnsupportedError
from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..registry import CodecInfo, register_codec
from ..scale_rules import FP16_BITS, clip_to_fp16
from .polar import angle_of_bin, bin_of_angle, from_polar, to_polar

BLOCK = 16
_LEVEL_BITS = (4, 2, 2, 2)


@dataclass(frozen=True, eq=False)
class PolarQuant(Codec):
    """See the module's docstring."""

    arrays = ("words", "radii")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (15 angles a block), radii fp16."""
        radius = x_rot.reshape(*x_rot.shape[:-1], -1, BLOCK)
        codes = []
        for level, bits in enumerate(_LEVEL_BITS):
            angle, radius = to_polar(radius)
            if level == 0:
                codes.append(bin_of_angle(angle, 2**bits))
            else:
                codes.append(_angles(level).nearest(angle))
        joined = mx.concatenate(codes, axis=-1)
        words = self._stream.pack(joined.reshape(*x_rot.shape[:-1], -1))
        return TokenArrays({"words": words, "radii": clip_to_fp16(radius[..., 0])})

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Every token in use: (B, heads, length, dim), still rotated."""
        radius = codes.view("radii", heads).astype(mx.float32)[..., None]
        numbers = self._stream.read(codes.view("words", heads))
        numbers = numbers.reshape(*numbers.shape[:-1], -1, BLOCK - 1)
        ends = [BLOCK - BLOCK // 2**level for level in range(len(_LEVEL_BITS) + 1)]
        for level in range(len(_LEVEL_BITS) - 1, -1, -1):
            code = numbers[..., ends[level] : ends[level + 1]]
            if level == 0:
                angle = angle_of_bin(code, 2 ** _LEVEL_BITS[0])
            else:
                angle = _angles(level).levels[code]
            radius = from_polar(angle, radius)
        return radius.reshape(*radius.shape[:-2], self.dim).astype(dtype)

    @property
    def _stream(self) -> BitStream:
        pattern: list[int] = []
        for level, bits in enumerate(_LEVEL_BITS):
            pattern += [bits] * (BLOCK >> (level + 1))
        return BitStream(tuple(pattern), self.dim // BLOCK * (BLOCK - 1))

    @property
    def bits_per_vector(self) -> int:
        """Angles and one fp16 radius a block; d=128: 512, or 4 an element."""
        return 32 * self._stream.words + FP16_BITS * (self.dim // BLOCK)


@functools.cache
def _angles(level: int) -> Codebook:
    def density(angle: Array) -> Array:
        mass: Array = np.sin(2 * angle) ** (2**level - 1)
        return mass

    return solve_interval(density, math.pi / 2, 2 ** _LEVEL_BITS[level])[1]


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> PolarQuant:
    if dim % BLOCK:
        raise UnsupportedError(
            f"head_dim {dim} is no multiple of {BLOCK}, polarquant's block",
            "use codec=turboquant",
        )
    return PolarQuant(spec, dim, rotation_for(dim, seed))


register_codec(CodecInfo("research.polarquant", (3.875,), _build))

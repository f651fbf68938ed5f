"""Angles and radii of pairs with one norm a vector: TurboAngle without side numbers.

Owns the codec. After a rotation a pair's radius follows Rayleigh's law, so a fixed
Lloyd-Max codebook serves all vectors, and the per-vector ranges of norms go: at 3 bits
an element a pair has 16 angles and 4 radii. Angle bins are uniform; radii are shrunk by
the mean cosine within a bin, which is the centroid's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..bitstream import Stream
from ..codebook import Array
from ..rotation import rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from . import lloyd
from .base import Side, register
from .scale import Rule, scaled, unit
from .table import TableCodec
from .turboangle import bin_of, check_even, polar
from .turboquant import usual_scale

#: Bits of a pair's radius, by bits per element; the angle has the rest.
_RADIUS_BITS = {2.5: 1, 3: 2, 3.5: 2, 4: 3}
_LONGEST = 6.0


@dataclass(frozen=True, eq=False)
class FixedRadius(TableCodec):
    """See the module's docstring; implements `codecs.base.Codec`.

    Args:
        scale: Which scale to store.
        radius_bits: Low bits of a pair's code.
    """

    scale: Rule
    radius_bits: int

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (a code a pair), scales fp16."""
        y, rms = unit(x_rot.astype(mx.float32))
        angle, norm = polar(y)
        bins = 2 ** (self.index_bits - self.radius_bits)
        radius = lloyd.nearest(_radii(2**self.radius_bits), norm)
        codes = (bin_of(angle, bins) << self.radius_bits) | radius
        tail = [(0, 0)] * 3 + [(0, self.pairs.count - self.dim // 2)]
        codes = mx.pad(codes, tail)
        scale = scaled(self.scale, rms, y, self.elements(codes))
        words = self.pairs.pack(codes)
        return TokenArrays({"words": words, "scales": scale}, x_rot.shape[-2])


def _points(bins: int, radii: int) -> mx.array:
    """The plane's points by a pair's code: (bins * radii, 2) float32."""
    shrink = math.sin(math.pi / bins) / (math.pi / bins)
    angle = (np.arange(bins) + 0.5) * (2 * math.pi / bins)
    turned = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]
    points = turned * (_radii(radii) * shrink)[:, None]
    array = mx.array(points.reshape(-1, 2).astype(np.float32))
    mx.eval(array)
    return array


@functools.cache
def _radii(count: int) -> Array:
    def rayleigh(r: Array) -> Array:
        mass: Array = r * np.exp(-r * r / 2)
        return mass

    return lloyd.solve(rayleigh, _LONGEST, count)


@register("turboangle-fixed")
def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> FixedRadius:
    check_even(dim)
    rotation, scale = rotation_for(dim, seed), usual_scale(side)
    bits, radius_bits = round(2 * spec.bits), _RADIUS_BITS[spec.bits]
    points = _points(2 ** (bits - radius_bits), 2**radius_bits)
    # Whole groups of 8 pairs, as kernels read them.
    pairs = Stream((bits,), -(-dim // 2 // 8) * 8)
    return FixedRadius(
        spec, dim, rotation, pairs, bits, 1.0, points, scale, radius_bits
    )

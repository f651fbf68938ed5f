"""Angles and radii of pairs with one norm a vector: TurboAngle without side numbers.

After a rotation a pair's radius follows Rayleigh's law, so a fixed Lloyd-Max codebook
serves all vectors, and the per-vector ranges of norms go: at 3 bits an element a pair
has 16 angles and 4 radii. Angle bins are uniform; radii are shrunk by the mean cosine
within a bin, which is the centroid's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...codebook import Array, Codebook, solve_interval
from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Side
from ..kernel_format import PAIRS, KernelFormat
from ..registry import CodecInfo, register_codec
from ..scale_rules import Rule, default_scale_rule, rms_normalize, scale_from_vectors
from ..scaled import TableCodec
from .polar import bin_of_angle, pad_pairs, pair_stream, require_even, to_polar

#: Bits of a pair's radius, by bits per element; the angle has the others.
_RADIUS_BITS = {2.5: 1, 3: 2, 3.5: 2, 4: 3}
_LARGEST_RADIUS = 6.0


@dataclass(frozen=True, eq=False)
class FixedRadius(TableCodec):
    """See the module's docstring.

    Args:
        scale_rule: Which scale to store.
        radius_bits: How many low bits of a pair's code are its radius.
    """

    scale_rule: Rule
    radius_bits: int

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (a code a pair), scales fp16."""
        y, rms = rms_normalize(x_rot.astype(mx.float32))
        angle, norm = to_polar(y)
        bins = 2 ** (self.index_bits - self.radius_bits)
        radius = _radii(2**self.radius_bits)[1].nearest(norm)
        codes = (bin_of_angle(angle, bins) << self.radius_bits) | radius
        codes = pad_pairs(codes, self.pairs)
        scales = scale_from_vectors(self.scale_rule, rms, y, self.points_of(codes))
        return TokenArrays({"words": self.pairs.pack(codes), "scales": scales})

    @functools.cached_property
    def kernel_format(self) -> KernelFormat:
        """The table of points."""
        return KernelFormat.table(PAIRS, self.index_bits, 0, self.step, self.points)


def _points(bins: int, radii: int) -> mx.array:
    """The plane's points by a pair's code: (bins * radii, 2) float32."""
    shrink = math.sin(math.pi / bins) / (math.pi / bins)
    angle = (np.arange(bins) + 0.5) * (2 * math.pi / bins)
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]
    points = directions * (_radii(radii)[0] * shrink)[:, None]
    array = mx.array(points.reshape(-1, 2).astype(np.float32))
    mx.eval(array)
    return array


@functools.cache
def _radii(count: int) -> tuple[Array, Codebook]:
    def rayleigh(r: Array) -> Array:
        mass: Array = r * np.exp(-r * r / 2)
        return mass

    return solve_interval(rayleigh, _LARGEST_RADIUS, count)


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> FixedRadius:
    require_even(dim)
    rotation, rule = rotation_for(dim, seed), default_scale_rule(side)
    bits, radius_bits = round(2 * spec.bits), _RADIUS_BITS[spec.bits]
    points = _points(2 ** (bits - radius_bits), 2**radius_bits)
    table = (pair_stream(bits, dim), bits, 1.0, points)
    return FixedRadius(spec, dim, rotation, *table, rule, radius_bits)


register_codec(CodecInfo("research.turboangle-fixed", tuple(_RADIUS_BITS), _build))

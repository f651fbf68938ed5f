"""TurboAngle: after a random rotation, angles and norms of pairs of coordinates.

Angles take n = round(4**bits) uniform bins (so ``bits`` are those of the angles per
element: 3.5 is 128 bins, 3 is 64), decoded at the bin's middle. Norms of keys take 8
bits linearly, norms of values 4 bits on a logarithmic scale, between each vector's
least and largest norm. Two fp16 scales say what these are: the largest norm, and either
the least over the largest (linear) or the logarithm of the largest over the least.

The paper counts log2(n) / 2 + norm bits / 2 + 32 / d bits an element; where n is no
power of two, more is stored, and `bits_per_vector` says how much.

Source: TurboAngle (arXiv 2603.27467), section 3 and tables 2 and 5.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mlx.core as mx

from ...bitstream import BitStream
from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..kernel_format import ANGLES, KernelFormat
from ..registry import CodecInfo, register_codec
from ..scale_rules import FP16_BITS, clip_to_fp16
from .polar import (
    angle_of_bin,
    bin_of_angle,
    from_polar,
    pad_pairs,
    pair_stream,
    require_even,
    to_polar,
)

_LINEAR, _LOGARITHMIC = 8, 4
#: Smallest norm that the logarithm sees, against the vector's largest.
_FLOOR = 1e-4
#: Angles that kernels have a table for.
_MAX_TABLE_BINS = 256


@dataclass(frozen=True, eq=False)
class TurboAngle(Codec):
    """See the module's docstring.

    Args:
        norm_bits: Bits of a pair's norm: 8 linear ones, or 4 logarithmic ones.
        bins: How many angles, from 2 to 2**16.
    """

    norm_bits: int
    bins: int
    arrays = ("words", "scales")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (angles, then norms) and two fp16 scales."""
        angle, norm = to_polar(x_rot)
        stored_largest = clip_to_fp16(mx.max(norm, axis=-1, keepdims=True))
        largest = stored_largest.astype(mx.float32)
        share = norm / mx.where(largest > 0, largest, 1.0)
        least = mx.min(share, axis=-1, keepdims=True)
        if self.norm_bits == _LINEAR:
            below = clip_to_fp16(mx.minimum(least, 1.0))
            span = 1 - below.astype(mx.float32)
            rank = (share - below) / mx.where(span > 0, span, 1.0)
        else:
            below = clip_to_fp16(-mx.log(mx.clip(least, _FLOOR, 1.0)))
            span = below.astype(mx.float32)
            rank = 1 + mx.log(mx.maximum(share, _FLOOR)) / mx.where(span > 0, span, 1.0)
        top = 2**self.norm_bits - 1
        norms = mx.clip(mx.round(rank * top), 0, top).astype(mx.uint32)
        bins = bin_of_angle(angle, self.bins)
        streams = [
            self._angles.pack(pad_pairs(bins, self._angles)),
            self._norms.pack(pad_pairs(norms, self._norms)),
        ]
        arrays = {
            "words": mx.concatenate(streams, axis=-1),
            "scales": mx.concatenate([stored_largest, below], axis=-1),
        }
        return TokenArrays(arrays)

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Every token in use: (B, heads, length, dim), still rotated."""
        words, count = codes.view("words", heads), self.dim // 2
        bins = self._angles.read(words[..., : self._angles.words])[..., :count]
        norms = self._norms.read(words[..., self._angles.words :])[..., :count]
        scales = codes.view("scales", heads).astype(mx.float32)
        largest, below = scales[..., :1], scales[..., 1:]
        rank = norms.astype(mx.float32) / (2**self.norm_bits - 1)
        if self.norm_bits == _LINEAR:
            share = below + (1 - below) * rank
        else:
            share = mx.exp(below * (rank - 1))
        return from_polar(angle_of_bin(bins, self.bins), share * largest).astype(dtype)

    @property
    def _angles(self) -> BitStream:
        return pair_stream(math.ceil(math.log2(self.bins)), self.dim)

    @property
    def _norms(self) -> BitStream:
        return pair_stream(self.norm_bits, self.dim)

    @property
    def bits_per_vector(self) -> int:
        """Angles, norms, two fp16 scales; d=128, 128 bins, keys: 992, 7.75 each."""
        return 32 * (self._angles.words + self._norms.words) + 2 * FP16_BITS

    @functools.cached_property
    def kernel_format(self) -> KernelFormat | None:
        """A table of unit vectors by angle."""
        if self.bins > _MAX_TABLE_BINS:
            return None
        bits = self._angles.pattern[0]
        angles = angle_of_bin(mx.arange(2**bits), self.bins)
        table = from_polar(angles, mx.ones_like(angles))
        return KernelFormat.table(ANGLES, bits, self.norm_bits, 1.0, table)


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TurboAngle:
    require_even(dim)
    norm_bits = _LINEAR if side == "keys" else _LOGARITHMIC
    bins = round(4**spec.bits)
    return TurboAngle(spec, dim, rotation_for(dim, seed), norm_bits, bins)


_WIDTHS = tuple(halves / 2 for halves in range(2, 9))
register_codec(CodecInfo("research.turboangle", _WIDTHS, _build))

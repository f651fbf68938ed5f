"""HQMQ: chunks of 4 elements as quaternions, directions from 24 Hurwitz units times S.

A chunk's direction is the nearest of g * u, g one of the 24 Hurwitz units (the 24-cell)
and u one of S random unit quaternions of the seed (a layer's and head's own in the
paper; one set serves here, since any isometry of it does as well). Its length is one of
a Lloyd-Max codebook, relative to the vector's root mean square. The one chunk that is
over 3 times the median length, if any, is kept apart in fp16: heavy channels are what
the paper rotates nothing for.

Source: Hurwitz Quaternion Multiplicative Quantization (arXiv 2605.27646); of its
lengths only the abstract's bits were to be had, so their codebook is ours.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...bitstream import BitStream
from ...codebook import Array, Codebook, interval_density
from ...errors import UnsupportedError
from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..registry import CodecInfo, register_codec
from ..scale_rules import (
    FP16_BITS,
    Rule,
    clip_to_fp16,
    default_scale_rule,
    rms_normalize,
    scale_from_vectors,
)
from .gaussian import gaussian_matrix

_CHUNK = 4
#: Random quaternions S, and bits of a length, by bits per element.
_SHAPES = {2: (2, 2), 2.5: (5, 3), 3: (21, 3), 3.5: (42, 4), 4: (85, 5)}
_OUTLIER = 3.0  # times the median length
_NO_CHUNK = 255
_LARGEST_LENGTH = 7.0
#: Lloyd-Max lengths of 4 standard normals, by count. They are written out because codes
#: depend on them: they come from Lloyd's iteration, which stops a little short of the
#: optimum that `codebook.solve` reaches (at 32 levels by 1e-8 of squared length).
# fmt: off
_LENGTHS = {
    4: (1.032318, 1.675153, 2.300021, 3.09668),
    8: (0.747962, 1.165177, 1.511869, 1.840201, 2.176236, 2.545563, 2.990935, 3.631286),
    16: (
        0.536533, 0.819937, 1.041996, 1.237167, 1.418232, 1.591941, 1.762737, 1.934119,
        2.109341, 2.291905, 2.486117, 2.697935, 2.936606, 3.218537, 3.578849, 4.123732,
    ),
    32: (
        0.381933, 0.578221, 0.728065, 0.855998, 0.970883, 1.077123, 1.177298, 1.273092,
        1.365693, 1.45599, 1.544689, 1.632374, 1.719554, 1.806689, 1.894218, 1.982568,
        2.072179, 2.163518, 2.257093, 2.353483, 2.45336, 2.557532, 2.666995, 2.783017,
        2.907266, 3.042021, 3.190545, 3.357774, 3.551789, 3.787331, 4.096436, 4.576702,
    ),
}
# fmt: on
#: Chunks compared with all directions at once.
_BATCH = 1 << 15


@dataclass(frozen=True, eq=False)
class Hqmq(Codec):
    """See the module's docstring.

    Args:
        scale_rule: Which scale to store.
        directions: (24 * S, 4) float32 unit quaternions.
        length_bits: How many low bits of a chunk's code are its length.
    """

    scale_rule: Rule
    directions: mx.array
    length_bits: int
    arrays = ("words", "scales", "place", "chunk")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words, scales, and the chunk kept apart."""
        chunks = x_rot.astype(mx.float32).reshape(*x_rot.shape[:-1], -1, _CHUNK)
        length = mx.linalg.norm(chunks, axis=-1)
        longest = mx.argmax(length, axis=-1, keepdims=True)
        has_outlier = mx.max(length, axis=-1, keepdims=True) > _OUTLIER * mx.median(
            length, axis=-1, keepdims=True
        )
        outlier = mx.take_along_axis(chunks, longest[..., None], axis=-2)[..., 0, :]
        is_outlier = has_outlier & (mx.arange(length.shape[-1]) == longest)
        others = mx.where(is_outlier[..., None], 0.0, chunks).reshape(x_rot.shape)
        y, rms = rms_normalize(others)
        codes = mx.where(is_outlier, 0, self._nearest(y.reshape(chunks.shape)))
        points = mx.where(is_outlier[..., None], 0.0, self._points(codes))
        points = points.reshape(x_rot.shape)
        arrays = {
            "words": self._stream.pack(codes),
            "scales": scale_from_vectors(self.scale_rule, rms, y, points),
            "place": mx.where(has_outlier, longest, _NO_CHUNK).astype(mx.uint8),
            "chunk": mx.where(has_outlier, clip_to_fp16(outlier), 0),
        }
        return TokenArrays(arrays)

    def _nearest(self, chunks: mx.array) -> mx.array:
        """Codes (...,) of chunks (..., 4): the direction, then the length."""
        flat = chunks.reshape(-1, _CHUNK)
        codes = []
        for start in range(0, len(flat), _BATCH):
            along = flat[start : start + _BATCH] @ self.directions.T
            best = mx.argmax(along, axis=-1, keepdims=True)
            projection = mx.take_along_axis(along, best, axis=-1)
            length = self._lengths.nearest(projection)
            codes.append((best << self.length_bits).astype(mx.uint32) | length)
        return mx.concatenate(codes).reshape(chunks.shape[:-1])

    def _points(self, codes: mx.array) -> mx.array:
        """Chunks (..., 4) that codes (...,) stand for."""
        length = self._lengths.levels[codes & (2**self.length_bits - 1)]
        return self.directions[codes >> self.length_bits] * length[..., None]

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Every token in use: (B, heads, length, dim)."""
        points = self._points(self._stream.read(codes.view("words", heads)))
        points = points * codes.view("scales", heads).astype(mx.float32)[..., None]
        place = codes.view("place", heads).astype(mx.int32)
        is_outlier = mx.arange(points.shape[-2]) == place
        outlier = codes.view("chunk", heads).astype(mx.float32)[..., None, :]
        chunks = mx.where(is_outlier[..., None], outlier, points)
        return chunks.reshape(*chunks.shape[:-2], self.dim).astype(dtype)

    @property
    def _lengths(self) -> Codebook:
        return _length_codebook(2**self.length_bits)

    @property
    def _stream(self) -> BitStream:
        return BitStream((round(_CHUNK * self.spec.bits),), self.dim // _CHUNK)

    @property
    def bits_per_vector(self) -> int:
        """Words, a scale, a place, a chunk; d=128 at 3 bits: 472, 3.69 an element."""
        return 32 * self._stream.words + FP16_BITS * (1 + _CHUNK) + 8


def product(a: Array, b: Array) -> Array:
    """Quaternion products of a and b (..., 4)."""
    a0, a1, a2, a3 = np.moveaxis(a, -1, 0)
    b0, b1, b2, b3 = np.moveaxis(b, -1, 0)
    parts = [
        a0 * b0 - a1 * b1 - a2 * b2 - a3 * b3,
        a0 * b1 + a1 * b0 + a2 * b3 - a3 * b2,
        a0 * b2 - a1 * b3 + a2 * b0 + a3 * b1,
        a0 * b3 + a1 * b2 - a2 * b1 + a3 * b0,
    ]
    return np.stack(parts, axis=-1)


def hurwitz_units() -> Array:
    """The 24 units of the Hurwitz quaternions: (24, 4)."""
    axes = np.concatenate([np.eye(_CHUNK), -np.eye(_CHUNK)])
    corners = np.array(list(itertools.product((0.5, -0.5), repeat=_CHUNK)))
    return np.concatenate([axes, corners])


@functools.cache
def _length_codebook(count: int) -> Codebook:
    def chi(r: Array) -> Array:
        mass: Array = r**3 * np.exp(-r * r / 2)
        return mass

    levels = np.array(_LENGTHS[count])
    return Codebook.of(levels, interval_density(chi, _LARGEST_LENGTH))


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Hqmq:
    if dim % _CHUNK or dim // _CHUNK >= _NO_CHUNK:
        raise UnsupportedError(
            f"head_dim {dim} is no multiple of {_CHUNK} below {_CHUNK * _NO_CHUNK}",
            "use codec=turboquant",
        )
    count, length_bits = _SHAPES[spec.bits]
    random = np.array(gaussian_matrix(count, _CHUNK, seed), dtype=np.float64)
    random /= np.linalg.norm(random, axis=-1, keepdims=True)
    units = product(hurwitz_units()[:, None], random[None]).reshape(-1, _CHUNK)
    directions = mx.array(units.astype(np.float32))
    mx.eval(directions)
    rotation, rule = rotation_for(dim, seed, "identity"), default_scale_rule(side)
    return Hqmq(spec, dim, rotation, rule, directions, length_bits)


register_codec(CodecInfo("research.hqmq", tuple(_SHAPES), _build))

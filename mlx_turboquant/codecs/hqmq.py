"""HQMQ: chunks of 4 elements as quaternions, directions from 24 Hurwitz units times S.

Owns the codec. A chunk's direction is the nearest of g * u, g one of the 24 Hurwitz
units (the 24-cell) and u one of S random unit quaternions of the seed (a layer's and
head's own in the paper; one set serves here, since any isometry of it does as well).
Its length is one of a Lloyd-Max codebook, relative to the vector's root mean square.
The one chunk that is over 3 times the median length, if any, is kept apart in fp16:
heavy channels are what the paper rotates nothing for.

Source: Hurwitz Quaternion Multiplicative Quantization (arXiv 2605.27646); of its
lengths only the abstract's bits were to be had, so their codebook is ours.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..bitstream import Stream
from ..codebook import Array
from ..errors import UnsupportedError
from ..rotation import Rotation, rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from . import lloyd
from .base import Side, Traits, register
from .scale import FP16_BITS, Rule, fp16, scaled, unit
from .sketch import gaussian
from .turboquant import usual_scale

_CHUNK = 4
#: Units besides the Hurwitz ones, and bits of a length, by bits per element.
_SHAPES = {2: (2, 2), 2.5: (5, 3), 3: (21, 3), 3.5: (42, 4), 4: (85, 5)}
_OUTLIER = 3.0  # times the median length
_NO_CHUNK = 255
_LONGEST = 7.0
#: Chunks compared with all directions at once.
_TOGETHER = 1 << 15


@dataclass(frozen=True, eq=False)
class Hqmq(Traits):
    """See the module's docstring; implements `codecs.base.Codec`.

    Args:
        scale: Which scale to store.
        units: (24 * S, 4) float32 directions.
        length_bits: Low bits of a chunk's code.
    """

    spec: CodecSpec
    dim: int
    rotation: Rotation
    scale: Rule
    units: mx.array
    length_bits: int
    arrays = ("words", "scales", "place", "chunk")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words, scales, and the chunk kept apart."""
        chunks = x_rot.astype(mx.float32).reshape(*x_rot.shape[:-1], -1, _CHUNK)
        length = mx.linalg.norm(chunks, axis=-1)
        longest = mx.argmax(length, axis=-1, keepdims=True)
        apart = mx.max(length, axis=-1, keepdims=True) > _OUTLIER * mx.median(
            length, axis=-1, keepdims=True
        )
        held = mx.take_along_axis(chunks, longest[..., None], axis=-2)[..., 0, :]
        here = apart & (mx.arange(length.shape[-1]) == longest)
        rest = mx.where(here[..., None], 0.0, chunks).reshape(x_rot.shape)
        y, rms = unit(rest)
        codes = self._nearest(y.reshape(chunks.shape))
        codes = mx.where(here, 0, codes)
        points = mx.where(here[..., None], 0.0, self._points(codes))
        arrays = {
            "words": self._stream.pack(codes),
            "scales": scaled(self.scale, rms, y, points.reshape(x_rot.shape)),
            "place": mx.where(apart, longest, _NO_CHUNK).astype(mx.uint8),
            "chunk": mx.where(apart, fp16(held), 0),
        }
        return TokenArrays(arrays, x_rot.shape[-2])

    def _nearest(self, chunks: mx.array) -> mx.array:
        """Codes (...,) of chunks (..., 4): the direction, then the length."""
        flat = chunks.reshape(-1, _CHUNK)
        found = []
        for start in range(0, len(flat), _TOGETHER):
            along = flat[start : start + _TOGETHER] @ self.units.T
            best = mx.argmax(along, axis=-1, keepdims=True)
            radius = mx.take_along_axis(along, best, axis=-1)
            number = lloyd.nearest(_lengths(2**self.length_bits), radius)
            found.append((best << self.length_bits).astype(mx.uint32) | number)
        return mx.concatenate(found).reshape(chunks.shape[:-1])

    def _points(self, codes: mx.array) -> mx.array:
        length = lloyd.floats(_lengths(2**self.length_bits))
        number = codes & (2**self.length_bits - 1)
        return self.units[codes >> self.length_bits] * length[number][..., None]

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Every used token: (B, heads, length, dim)."""
        points = self._points(self._stream.windows(codes.view("words", heads)))
        points = points * codes.view("scales", heads).astype(mx.float32)[..., None]
        number = mx.arange(points.shape[-2])
        here = number == codes.view("place", heads).astype(mx.int32)
        held = codes.view("chunk", heads).astype(mx.float32)[..., None, :]
        whole = mx.where(here[..., None], held, points)
        return whole.reshape(*whole.shape[:-2], self.dim).astype(dtype)

    @property
    def _stream(self) -> Stream:
        return Stream((round(_CHUNK * self.spec.bits),), self.dim // _CHUNK)

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
def _lengths(count: int) -> Array:
    def chi(r: Array) -> Array:
        mass: Array = r**3 * np.exp(-r * r / 2)
        return mass

    return lloyd.solve(chi, _LONGEST, count)


@register("hqmq")
def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Hqmq:
    if dim % _CHUNK or dim // _CHUNK >= _NO_CHUNK:
        raise UnsupportedError(
            f"head_dim {dim} is no multiple of {_CHUNK} below {_CHUNK * _NO_CHUNK}",
            "use codec=turboquant",
        )
    count, length_bits = _SHAPES[spec.bits]
    random = np.array(gaussian(count, _CHUNK, seed), dtype=np.float64)
    random /= np.linalg.norm(random, axis=-1, keepdims=True)
    units = product(hurwitz_units()[:, None], random[None]).reshape(-1, _CHUNK)
    array = mx.array(units.astype(np.float32))
    mx.eval(array)
    rotation = rotation_for(dim, seed, "identity")
    return Hqmq(spec, dim, rotation, usual_scale(side), array, length_bits)

"""Polar coordinates of pairs of elements: what angle codecs share."""

from __future__ import annotations

import math

import mlx.core as mx

from ...bitstream import BitStream
from ...errors import UnsupportedError

#: Pairs that a kernel's thread reads together.
_GROUP_PAIRS = 8


def to_polar(x: mx.array) -> tuple[mx.array, mx.array]:
    """Angles in -pi..pi and norms (..., D / 2) float32 of consecutive pairs."""
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return mx.arctan2(odd, even), mx.sqrt(even * even + odd * odd)


def from_polar(angle: mx.array, norm: mx.array) -> mx.array:
    """The inverse of `to_polar`: (..., D) float32."""
    pairs = mx.stack([norm * mx.cos(angle), norm * mx.sin(angle)], axis=-1)
    return pairs.reshape(*angle.shape[:-1], -1)


def bin_of_angle(angle: mx.array, bins: int) -> mx.array:
    """Which of ``bins`` equal parts of the circle angles are in, uint32."""
    turn = mx.floor(angle * (bins / (2 * math.pi))).astype(mx.int32)
    return (turn % bins).astype(mx.uint32)


def angle_of_bin(codes: mx.array, bins: int) -> mx.array:
    """The angle in the middle of each part, float32."""
    return (codes.astype(mx.float32) + 0.5) * (2 * math.pi / bins)


def pair_stream(bits: int, dim: int) -> BitStream:
    """A stream with ``bits`` bits a pair, filled up to whole groups of 8 pairs."""
    return BitStream((bits,), -(-dim // 2 // _GROUP_PAIRS) * _GROUP_PAIRS)


def pad_pairs(codes: mx.array, stream: BitStream) -> mx.array:
    """Codes (B, H, T, pairs) filled up with zeros to what a stream holds."""
    return mx.pad(codes, [(0, 0)] * 3 + [(0, stream.count - codes.shape[-1])])


def require_even(dim: int) -> None:
    """Refuse vectors that do not split into pairs.

    Raises:
        UnsupportedError: if ``dim`` is odd.
    """
    if dim % 2:
        raise UnsupportedError(
            f"head_dim {dim} is odd, and pairs of coordinates are quantized",
            "use codec=turboquant",
        )

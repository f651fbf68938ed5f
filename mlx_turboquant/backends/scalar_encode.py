"""Encoding on MLX's CPU device: what `codecs.turboquant` defines, in vectorized loops.

Owns that one path; words and scales are the definition's, bit for bit where MLX's sums
add elements in order (x86-64). What makes it fast:

* Vectors are columns. Sums over a vector then add whole rows, in the same order.
* A magnitude's level comes from comparisons with constants, `_STEP` to a compiled loop.
  With conditions on signs, with constants as inputs, or with more operations in a row
  than MLX fuses, g++ makes such a loop 4 to 12 times slower.
* Codes are made for the best gain only, and packed by a product: a code that is whole
  within a 16-bit half adds itself times a power of two to it, exactly in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..codecs.scale_rules import rms_normalize, scale_from_products
from ..codecs.turboquant import TurboQuant
from ..packing import pack
from ..tokens import TokenArrays

#: Vectors at a time: their products with levels stay in a cache.
_BLOCK = 1024
#: Boundaries that a compiled loop compares with: 2 operations each, 11 in a row.
_STEP = 7
#: More bits need more loops than comparisons save, and seconds of a compiler's time.
MAX_BITS = 6
#: A float32 times this is the float32 before it.
_BEFORE = 1 - 2.0**-24

#: One over a gain, and <y, c> and ||c||^2 (1, n) of its codewords c.
Candidate = tuple[mx.array, mx.array, mx.array]
Loop = Callable[..., mx.array]
Pairs = Callable[..., tuple[mx.array, mx.array]]


@dataclass(frozen=True, eq=False)
class ScalarEncoder:
    """`TurboQuant.encode` of one codec of up to `MAX_BITS` bits.

    Attributes:
        codec: What it encodes for.
        boundaries: Positive boundaries, ascending; the others are their negatives.
        levels: Positive levels, one more.
        inverse_gains: One over each gain tried, float32 scalars.
        packer: How codes become words.
    """

    codec: TurboQuant
    boundaries: tuple[float, ...]
    levels: tuple[float, ...]
    inverse_gains: list[mx.array]
    packer: Packer

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (B, H, T, W) uint32, scales fp16."""
        lead = x_rot.shape[:-1]
        rows = x_rot.astype(mx.float32).reshape(-1, self.codec.dim)
        blocks = [
            self._encode_block(rows[first : first + _BLOCK])
            for first in range(0, rows.shape[0], _BLOCK)
        ]
        words = mx.concatenate([words for words, _ in blocks], axis=0)
        scales = mx.concatenate([scales for _, scales in blocks], axis=0)
        return TokenArrays(
            {"words": words.reshape(*lead, -1), "scales": scales.reshape(*lead, 1)}
        )

    def _encode_block(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Vectors (n, dim) to words (n, W), scales (n, 1)."""
        y, rms = rms_normalize(mx.contiguous(rows.T), axis=0)
        size, tie = _magnitudes(y)
        best, *others = ((gain, *self._sums(size, tie, gain)) for gain in self._tried)
        for candidate in others:
            best = _better(*candidate, *best)
        inverse_gain, dot, code_sq = best
        rank = _chain(
            size * inverse_gain * tie,
            self.boundaries,
            tuple(i + 0.5 for i in range(len(self.levels))),
        )
        codes = _signed(rank, y) + (len(self.levels) - 0.5)
        rule, dim = self.codec.scale_rule, self.codec.dim
        scales = scale_from_products(rule, rms, dim, dot, code_sq)
        return self.packer.pack(codes), scales.T

    @property
    def _tried(self) -> list[mx.array]:
        """Gains that may make different codes: at 1 bit, codes are signs."""
        return self.inverse_gains if self.boundaries else self.inverse_gains[:1]

    def _sums(
        self, size: mx.array, tie: mx.array, inverse_gain: mx.array
    ) -> tuple[mx.array, mx.array]:
        """<y, c> and ||c||^2 (1, n) of the codewords c of one gain."""
        last = max(0, len(self.boundaries) - 1) // _STEP * _STEP
        level = _chain(
            size * inverse_gain * tie, self.boundaries[:last], self.levels[: last + 1]
        )
        products = _multiplier(self.boundaries[last:], self.levels[last + 1 :])
        dots, squares = products(size, tie, inverse_gain, level)
        dot = mx.sum(dots, axis=0, keepdims=True)
        return dot, mx.sum(squares, axis=0, keepdims=True)


@dataclass(frozen=True, eq=False)
class Packer:
    """`packing.pack` as products, found by packing single bits.

    Attributes:
        bits: Bits of a code.
        whole: What a code adds to each 16-bit half, in units of its own: (dim, 2 W)
            float32; 0 for codes whose bits are not side by side.
        split: Elements of the others (S,).
        split_bits: What each of their bits adds: (bits * S, 2 W), bit by bit.
    """

    bits: int
    whole: mx.array
    split: mx.array
    split_bits: mx.array

    @classmethod
    def of(cls, bits: int, dim: int) -> Packer:
        """For vectors of ``dim`` codes of ``bits`` bits."""
        single = np.eye(dim, dtype=np.uint32)[:, None] << np.arange(bits)[:, None]
        halves = np.array(pack(mx.array(single), bits)).view(np.uint16)
        together = halves == halves[:, :1] << np.arange(bits)[:, None]
        is_whole = together.all(axis=(1, 2))
        whole = np.where(is_whole[:, None], halves[:, 0], 0)
        split = np.flatnonzero(~is_whole)
        by_bit = halves[split].swapaxes(0, 1).reshape(-1, halves.shape[-1])
        arrays = (whole.astype(np.float32), split, by_bit.astype(np.float32))
        packer = cls(bits, *(mx.array(array) for array in arrays))
        mx.eval(packer.whole, packer.split, packer.split_bits)
        return packer

    def pack(self, codes: mx.array) -> mx.array:
        """Codes (dim, n) float32 to words (n, W) uint32."""
        halves = codes.T @ self.whole
        if self.split.size:
            some = codes[self.split].astype(mx.uint32)
            planes = [(some >> bit) & 1 for bit in range(self.bits)]
            ones = mx.concatenate(planes, axis=0).astype(mx.float32)
            halves = mx.addmm(halves, ones.T, self.split_bits)
        return halves.astype(mx.uint16).view(mx.uint32)


@functools.cache
def encoder_for(codec: TurboQuant) -> ScalarEncoder:
    """Made once for each codec.

    Its levels are odd, so the boundary in the middle is 0.
    """
    half = 2 ** (codec.bits - 1)
    levels = np.array(codec.levels(mx.arange(half, 2 * half))).tolist()
    boundaries = np.array(codec.codebook.boundaries[half:]).tolist()
    inverse_gains = [mx.array(1 / gain) for gain in codec.gains]
    mx.eval(inverse_gains)
    packer = Packer.of(codec.bits, codec.dim)
    return ScalarEncoder(codec, tuple(boundaries), tuple(levels), inverse_gains, packer)


def _chain(
    u: mx.array, boundaries: tuple[float, ...], values: tuple[float, ...]
) -> mx.array:
    """The value of each u's interval: values[i] from boundaries[i - 1] on."""
    chosen = mx.array(values[0])
    for first in range(0, len(boundaries), _STEP):
        some = slice(first, first + _STEP)
        chosen = _chooser(boundaries[some], values[1:][some])(u, chosen)
    return chosen


@functools.cache
def _chooser(boundaries: tuple[float, ...], values: tuple[float, ...]) -> Loop:
    """A compiled loop over some boundaries; takes u and the value below them."""

    def choose(u: mx.array, chosen: mx.array) -> mx.array:
        for boundary, value in zip(boundaries, values, strict=True):
            chosen = mx.where(u >= boundary, value, chosen)
        return chosen

    compiled: Loop = mx.compile(choose)
    return compiled


@functools.cache
def _multiplier(boundaries: tuple[float, ...], levels: tuple[float, ...]) -> Pairs:
    """The last of such loops, which goes on to |y| times the level, and its square."""

    def multiply(
        size: mx.array, tie: mx.array, inverse_gain: mx.array, level: mx.array
    ) -> tuple[mx.array, mx.array]:
        u = size * inverse_gain * tie
        for boundary, value in zip(boundaries, levels, strict=True):
            level = mx.where(u >= boundary, value, level)
        return size * level, mx.broadcast_to(level * level, size.shape)

    compiled: Pairs = mx.compile(multiply)
    return compiled


@mx.compile
def _magnitudes(y: mx.array) -> tuple[mx.array, mx.array]:
    """|y|, and what to multiply it with where it is compared with a boundary.

    A tie goes to the level above, for a negative y to the smaller magnitude.
    """
    return mx.abs(y), mx.where(y < 0, _BEFORE, 1.0)


@mx.compile
def _signed(size: mx.array, like: mx.array) -> mx.array:
    return size * mx.where(like < 0, -1.0, 1.0)


@mx.compile
def _better(
    gain: mx.array,
    dot: mx.array,
    code_sq: mx.array,
    best_gain: mx.array,
    best_dot: mx.array,
    best_code_sq: mx.array,
) -> Candidate:
    """Whichever codeword has the smaller angle to y; see `TurboQuant`."""
    better = dot * dot * best_code_sq > best_dot * best_dot * code_sq
    return (
        mx.where(better, gain, best_gain),
        mx.where(better, dot, best_dot),
        mx.where(better, code_sq, best_code_sq),
    )

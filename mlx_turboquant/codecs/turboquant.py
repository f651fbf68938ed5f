"""TurboQuant-mse: rotate, quantize each coordinate with Lloyd-Max, keep one scale.

Source: TurboQuant (arXiv 2504.19874), Algorithm 1. Two things are ours. The scale is
chosen by a rule (`scale_rules`) in place of the vector's own norm. And it is searched
for: quantize y / g for a few gains g and keep the codeword with the smallest angle to
y. Neither changes the format or the decoder; the search lowers the error by 5% at 3
bits and 14% at 4. Kernels and `backends.scalar_encode` are held to what is here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ..codebook import Codebook
from ..packing import pack
from ..polynomial import coefficients, polynomial_codebook
from ..rotation import Rotation, rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from .base import Side
from .kernel_format import MIN_ELEMENTS, EncodeFormat
from .registry import CodecInfo, register_codec
from .scale_rules import (
    RULES,
    Rule,
    default_scale_rule,
    rms_normalize,
    scale_from_products,
)
from .scaled import ScalarCodec

#: Gains tried while encoding; from a greedy search (dev/LOG.md, "scale search").
SEARCH_GAINS = (0.82, 0.88, 0.94, 1.0, 1.06, 1.14, 1.24)
#: Bits that `cache.bit_allocation` gives out; few, because a GPU compiles a kernel for
#: each pair of them.
_CHOICES = (2, 3, 4, 5, 6, 8)
#: H100, 131,072 tokens: 60 us for 56 MB of 3-bit codes, 182 us for 268 MB of fp16.
_READ_COST = 1.6


class _Candidate(NamedTuple):
    """Codes of one gain, with <y, c> and ||c||^2 (..., 1) of their codeword c."""

    codes: mx.array
    dot: mx.array
    code_sq: mx.array


@dataclass(frozen=True, eq=False)
class TurboQuant(ScalarCodec):
    """TurboQuant-mse: the nearest level of each rotated coordinate, and one scale.

    Args:
        codebook: Its levels, Lloyd-Max's or within 0.4% of their error.
        scale_rule: Which scale to store.
        gains: Encode-time gains to try; ``(1.0,)`` is the paper's plain rule.
    """

    codebook: Codebook
    scale_rule: Rule
    gains: tuple[float, ...] = SEARCH_GAINS

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (B, H, T, W) uint32, scales fp16."""
        y, rms = rms_normalize(x_rot.astype(mx.float32))
        codes, dot, code_sq = self._search(y)
        scales = scale_from_products(self.scale_rule, rms, self.dim, dot, code_sq)
        return TokenArrays({"words": pack(codes, self.bits), "scales": scales})

    def _search(self, y: mx.array) -> _Candidate:
        """The candidate whose codeword has the smallest angle to y."""
        best, *others = (self._quantize(y, gain) for gain in self.gains)
        for candidate in others:
            # cos^2 = dot^2 / (||y||^2 ||c||^2): compare without the common ||y||.
            better = (
                candidate.dot * candidate.dot * best.code_sq
                > best.dot * best.dot * candidate.code_sq
            )
            pairs = zip(candidate, best, strict=True)
            best = _Candidate(*(mx.where(better, new, old) for new, old in pairs))
        return best

    def _quantize(self, y: mx.array, gain: float) -> _Candidate:
        codes = self.codebook.nearest(y * (1 / gain))
        level = self.levels(codes)
        dot = mx.sum(y * level, axis=-1, keepdims=True)
        return _Candidate(codes, dot, mx.sum(level * level, axis=-1, keepdims=True))

    @functools.cached_property
    def encode_format(self) -> EncodeFormat:
        """For the scalar kernel."""
        inverse_gains = mx.array([1 / gain for gain in self.gains])
        parts = [self.codebook.levels, self.codebook.boundaries, inverse_gains]
        table = mx.concatenate(parts)
        table = mx.pad(table, (0, max(0, MIN_ELEMENTS - table.size)))
        mx.eval(table)
        template = {
            "BITS": self.bits,
            "GAINS": len(self.gains),
            "RULE": RULES.index(self.scale_rule),
        }
        return EncodeFormat("scalar", template, table, self.words)


def turboquant(
    spec: CodecSpec,
    dim: int,
    bits: int,
    rotation: Rotation,
    scale_rule: Rule,
    gains: tuple[float, ...] = SEARCH_GAINS,
) -> TurboQuant:
    """A `TurboQuant` of ``bits`` bits, also as a part of another codec."""
    terms, codebook = coefficients(dim, bits), polynomial_codebook(dim, bits)
    return TurboQuant(spec, dim, rotation, bits, terms, codebook, scale_rule, gains)


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TurboQuant:
    rule = default_scale_rule(side)
    return turboquant(spec, dim, int(spec.bits), rotation_for(dim, seed), rule)


def _choices(dim: int) -> list[tuple[CodecSpec, float]]:
    return [
        (CodecSpec("turboquant", bits), polynomial_codebook(dim, bits).mse)
        for bits in _CHOICES
    ]


register_codec(
    CodecInfo(
        "turboquant",
        tuple(range(1, 9)),
        _build,
        choices=_choices,
        read_cost=_READ_COST,
    )
)

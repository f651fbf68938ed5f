"""How kernels are told of a codec: a ``Format`` of ``metal/formats.h``, and numbers.

Owns that translation, for the kinds of codecs that kernels can read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from ..codecs.scalar import ScalarCodec
from ..codecs.trellis import Trellis
from ..codecs.turboangle import TurboAngle, cartesian, middle_of
from ..codecs.turboangle_fixed import FixedRadius
from ..polynomial import decoder_table

#: Codecs that some kernel reads.
Readable = ScalarCodec | FixedRadius | Trellis | TurboAngle
_POLYNOMIAL, _PAIRS, _TRELLIS, _ANGLES = range(4)


@dataclass(frozen=True)
class Format:
    """Template arguments of one side.

    Attributes:
        kind: POLYNOMIAL, PAIRS, TRELLIS or ANGLES.
        bits: Of an element's code, or of a pair's.
        terms: Of the polynomial, or an even element's own bits, or bits of a norm.
    """

    kind: int
    bits: int
    terms: int

    @property
    def has_table(self) -> bool:
        """Whether levels are looked up."""
        return self.kind != _POLYNOMIAL


def format_of(codec: Readable) -> Format:
    """What a kernel is specialised for."""
    if isinstance(codec, ScalarCodec):
        return Format(_POLYNOMIAL, codec.bits, len(codec.coefficients))
    bits = codec.pairs.pattern[0]
    if isinstance(codec, TurboAngle):
        return Format(_ANGLES, bits, codec.norm_bits)
    if isinstance(codec, FixedRadius):
        return Format(_PAIRS, bits, 0)
    return Format(_TRELLIS, bits, codec.widths[0])


@functools.lru_cache(maxsize=64)
def decode_params_of(codec: Readable) -> mx.array:
    """What it decodes with, float32: a gain, then a polynomial or a table."""
    if isinstance(codec, ScalarCodec):
        params = mx.array(decoder_table(codec.coefficients))
    elif isinstance(codec, TurboAngle):
        bins = middle_of(mx.arange(2 ** codec.pairs.pattern[0]), codec.bins)
        params = mx.concatenate([mx.ones((1,)), cartesian(bins, mx.ones_like(bins))])
    elif isinstance(codec, FixedRadius):
        params = mx.concatenate([mx.ones((1,)), codec.points.reshape(-1)])
    else:
        half = codec.levels[:, : codec.levels.shape[1] // 2]
        both = mx.stack([half[0], half[-1]], axis=-1)
        params = mx.concatenate([mx.array([codec.unit]), both.reshape(-1)])
    mx.eval(params)
    return params

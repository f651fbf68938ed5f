"""Trellis-coded quantization: a level is computed from 8 bits of a stream.

A vector of d elements at R bits is a circle of d * R bits, low bits first in uint32
words (`bitstream`). Element i's window is the 8 bits from its own on:

    stream       ... | own bits of i | own bits of i + 1 | own bits of i + 2 | ...
    window of i      |<------------- 8 bits ------------>|

Its level is a formula of the window (`trellis_levels`), one for even and one for odd
elements. Own bits are R; at half rates even elements have R + 1/2, odd ones R - 1/2. So
an element shares bits with those behind it, and a search (`viterbi`) finds the stream
whose levels are nearest: 1.9 to 2.3 dB less error than Lloyd-Max at equal bits, decoded
without any state.

A dim whose bits do not fill words is padded. Sources: trellis-coded quantization,
Marcellin and Fischer (1990); tail-biting bit-shift trellises for transformers and codes
that are computed, QTIP (arXiv 2406.11235), section 3. The formula is ours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..bitstream import BitStream
from ..rotation import rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from . import viterbi
from .base import Side
from .kernel_format import EncodeFormat, KernelFormat
from .registry import CodecInfo, codec_info, register_codec
from .scale_rules import (
    RULES,
    Rule,
    default_scale_rule,
    rms_normalize,
    scale_from_vectors,
)
from .scaled import TableCodec
from .trellis_levels import FORMULAS, WINDOW, Formula

#: The largest level as the search sees it, a whole number: half as fine costs 1% of
#: error at 4 bits, this 0.3%.
_SEARCH_PEAK = 254
#: Bits that `cache.bit_allocation` gives out.
_CHOICES = (2, 2.5, 3, 3.5, 4)
#: H100, 131,072 tokens: 1.41 times `turboquant`'s time at 3 bits, whose cost is 1.6.
_READ_COST = 2.3


@dataclass(frozen=True, eq=False)
class TrellisCodec(TableCodec):
    """A level is computed from 8 bits of a stream, found by a tail-biting search.

    Args:
        scale_rule: Which scale to store.
        formula: What levels are computed by.
    """

    scale_rule: Rule
    formula: Formula

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (B, H, T, W) uint32, scales fp16."""
        y, rms = rms_normalize(x_rot.astype(mx.float32))
        target = mx.round(y / self.search_step)
        target = mx.clip(target, -viterbi.CLIP, viterbi.CLIP)
        target = mx.pad(target, [(0, 0)] * 3 + [(0, self._padded_dim - self.dim)])
        windows = viterbi.best_windows(self.graph, target.reshape(-1, self._padded_dim))
        pairs = windows.reshape(*y.shape[:-1], -1, 2)
        # A pair's index: the first element's window, and the second's top bits.
        index = pairs[..., 0] | (pairs[..., 1] << self.formula.widths[0])
        scales = scale_from_vectors(self.scale_rule, rms, y, self.points_of(index))
        words = self.pairs.pack(index & (2 ** self.pairs.pattern[0] - 1))
        return TokenArrays({"words": words, "scales": scales})

    @property
    def _padded_dim(self) -> int:
        return 2 * self.pairs.count

    @functools.cached_property
    def search_step(self) -> float:
        """What targets and levels of the search are multiples of."""
        return self.step * float(np.abs(self.formula.levels).max()) / _SEARCH_PEAK

    @functools.cached_property
    def graph(self) -> viterbi.TrellisGraph:
        """What the search walks: from the last element, which is odd, to the first."""
        levels = np.round(self.formula.levels * (self.step / self.search_step))
        widths = self.formula.widths[::-1]
        return viterbi.TrellisGraph(WINDOW, widths, levels[::-1].copy())

    @functools.cached_property
    def kernel_format(self) -> KernelFormat:
        """By the formula."""
        bits, even_bits = self.pairs.pattern[0], self.formula.widths[0]
        return KernelFormat.trellis(bits, even_bits, self.formula.params)

    @functools.cached_property
    def encode_format(self) -> EncodeFormat:
        """For the trellis kernel: levels as the search sees them, and as they are."""
        searched = mx.array(self.graph.levels[::-1].reshape(-1))
        levels = mx.array(self.formula.levels).reshape(-1) * self.step
        table = mx.concatenate([searched, mx.array([self.search_step]), levels])
        mx.eval(table)
        template = {
            "COUNT": self._padded_dim,
            "EVEN": self.formula.widths[0],
            "ODD": self.formula.widths[1],
            "RULE": RULES.index(self.scale_rule),
        }
        return EncodeFormat("trellis", template, table, self.words)


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TrellisCodec:
    formula = FORMULAS[spec.bits]
    even_bits, odd_bits = formula.widths
    # The circle closes only if its bits fill words: so many pairs, or multiples.
    fill = 16 if even_bits == odd_bits else 32
    pairs = BitStream((even_bits + odd_bits,), -(-dim // (2 * fill)) * fill)
    index_bits = even_bits + WINDOW
    index, (even, odd) = np.arange(2**index_bits), formula.levels
    points = np.stack([even[index % 2**WINDOW], odd[index >> even_bits]], axis=-1)
    table = (pairs, index_bits, formula.step, mx.array(points))
    mx.eval(table[-1])
    rotation, rule = rotation_for(dim, seed), default_scale_rule(side)
    return TrellisCodec(spec, dim, rotation, *table, rule, formula)


def _choices(dim: int) -> list[tuple[CodecSpec, float]]:
    """Its own, then turboquant's widths above them: the trellis has none."""
    scalar = codec_info("turboquant").choices
    assert scalar is not None, "turboquant is adaptive"
    above = [choice for choice in scalar(dim) if choice[0].bits > _CHOICES[-1]]
    return [
        (CodecSpec.of("trellis", bits), FORMULAS[bits].mse) for bits in _CHOICES
    ] + above


register_codec(
    CodecInfo(
        "trellis",
        tuple(FORMULAS),
        _build,
        choices=_choices,
        read_cost=_READ_COST,
    )
)

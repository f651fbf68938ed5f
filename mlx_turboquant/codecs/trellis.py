"""Trellis-coded quantization: a level is looked up by 8 bits of a stream.

A vector of d elements at R bits is a circle of d * R bits, low bits first in uint32
words (`bitstream`). Element i's window is the 8 bits from its own on:

    stream       ... | own bits of i | own bits of i + 1 | own bits of i + 2 | ...
    window of i      |<------------- 8 bits ------------>|

Its level is a table's entry at the low 7 bits of the window, negated if the top one is
set. Own bits are R; at half rates even elements have R + 1/2 and a table of their own,
odd ones R - 1/2. So an element shares bits with those behind it, and a search
(`viterbi`) finds the stream whose levels are nearest: 1.9 to 2.3 dB less error than
Lloyd-Max at equal bits, decoded without any state.

Tables are trained by ``benchmarks/train_trellis.py``. A dim whose bits do not fill
words is padded. Sources: trellis-coded quantization, Marcellin and Fischer (1990);
tail-biting bit-shift trellises for transformers, QTIP (arXiv 2406.11235), section 3.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

from ..bitstream import BitStream
from ..rotation import rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from . import viterbi
from .base import Side
from .kernel_format import TRELLIS, EncodeFormat, KernelFormat
from .registry import CodecInfo, codec_info, register_codec
from .scale_rules import (
    RULES,
    Rule,
    default_scale_rule,
    rms_normalize,
    scale_from_vectors,
)
from .scaled import TableCodec

#: Bits of a window.
WINDOW = 8
#: The search sees whole multiples of one step over this: halves of a step cost 0.3% of
#: error at 4 bits, whole steps 1.3%.
TARGET_RESOLUTION = 2
#: Steps in a kernel's unit of levels: the attention kernel multiplies queries by that
#: unit; by one step they would be halves that are subnormal at 512 dims.
_KERNEL_UNIT = 32
#: Bits that `cache.bit_allocation` gives out.
_CHOICES = (2, 2.5, 3, 3.5, 4)
#: H100, 131,072 tokens: 130 us for 56 MB of 3-bit codes, 182 us for 268 MB of fp16.
_READ_COST = 3.4


@dataclass(frozen=True, eq=False)
class TrellisCodec(TableCodec):
    """A level is looked up by 8 bits of a stream, found by a tail-biting search.

    Args:
        scale_rule: Which scale to store.
        widths: Own bits of an element, in turns: even ones first.
        levels: By turn and window: (turns, 256) float32, in steps.
    """

    scale_rule: Rule
    widths: tuple[int, ...]
    levels: mx.array

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (B, H, T, W) uint32, scales fp16."""
        y, rms = rms_normalize(x_rot.astype(mx.float32))
        target = mx.round(y / self.step * TARGET_RESOLUTION)
        target = mx.clip(target, -viterbi.CLIP, viterbi.CLIP)
        target = mx.pad(target, [(0, 0)] * 3 + [(0, self._padded_dim - self.dim)])
        windows = viterbi.best_windows(self.graph, target.reshape(-1, self._padded_dim))
        pairs = windows.reshape(*y.shape[:-1], -1, 2)
        # A pair's index: the first element's window, and the second's top bits.
        index = pairs[..., 0] | (pairs[..., 1] << self.widths[0])
        scales = scale_from_vectors(self.scale_rule, rms, y, self.points_of(index))
        words = self.pairs.pack(index & (2 ** self.pairs.pattern[0] - 1))
        return TokenArrays({"words": words, "scales": scales})

    @property
    def _padded_dim(self) -> int:
        return 2 * self.pairs.count

    @functools.cached_property
    def graph(self) -> viterbi.TrellisGraph:
        """What the search walks: from the last element, which is odd, to the first."""
        levels = np.array(self.levels)[::-1].copy() * TARGET_RESOLUTION
        return viterbi.TrellisGraph(WINDOW, self.widths[::-1], levels)

    @functools.cached_property
    def kernel_format(self) -> KernelFormat:
        """A table by half a window (the other half is its negative), even and odd."""
        half = self.levels[:, : 2 ** (WINDOW - 1)]
        table = mx.stack([half[0], half[-1]], axis=-1)
        bits = self.pairs.pattern[0]
        unit, table = self.step * _KERNEL_UNIT, table / _KERNEL_UNIT
        return KernelFormat.table(TRELLIS, bits, self.widths[0], unit, table)

    @functools.cached_property
    def encode_format(self) -> EncodeFormat:
        """For the trellis kernel, with levels as the search sees them."""
        levels = mx.concatenate([self.levels[0], self.levels[-1]]) * TARGET_RESOLUTION
        table = mx.concatenate([levels, mx.array([self.step / TARGET_RESOLUTION])])
        mx.eval(table)
        template = {
            "COUNT": self._padded_dim,
            "EVEN": self.widths[0],
            "ODD": self.widths[-1],
            "RULE": RULES.index(self.scale_rule),
        }
        return EncodeFormat("trellis", template, table, self.words)


def trained_levels(bits: float) -> tuple[tuple[int, ...], mx.array]:
    """Own bits of an element in turns, and levels (turns, 256) in steps, by window."""
    half = np.array(_tables()[f"{bits:g}"]["levels"], dtype=np.float32)
    levels = mx.array(np.concatenate([half, -half], axis=1))
    mx.eval(levels)
    low = int(bits)
    return ((low,) if bits == low else (low + 1, low)), levels


def mse(bits: float) -> float:
    """Relative squared error of rotated vectors, measured at d=128 while training."""
    return float(_tables()[f"{bits:g}"]["mse"])


@functools.cache
def _tables() -> dict[str, Any]:
    path = files("mlx_turboquant").joinpath("data/trellis.json")
    tables: dict[str, Any] = json.loads(path.read_text())["tables"]
    return tables


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TrellisCodec:
    widths, levels = trained_levels(spec.bits)
    step = float(_tables()[f"{spec.bits:g}"]["unit"])
    # The circle closes only if its bits fill words: so many pairs, or multiples.
    fill = 16 if len(widths) == 1 else 32
    pairs = BitStream((round(2 * spec.bits),), -(-dim // (2 * fill)) * fill)
    index_bits = widths[0] + WINDOW
    index, by_window = np.arange(2**index_bits), np.array(levels)
    even = by_window[0][index % 2**WINDOW]
    odd = by_window[-1][index >> widths[0]]
    points = mx.array(np.stack([even, odd], axis=-1))
    mx.eval(points)
    rotation, rule = rotation_for(dim, seed), default_scale_rule(side)
    table = (pairs, index_bits, step, points)
    return TrellisCodec(spec, dim, rotation, *table, rule, widths, levels)


def _choices(dim: int) -> list[tuple[CodecSpec, float]]:
    """Its own, then turboquant's widths above them: the trellis has none."""
    scalar = codec_info("turboquant").choices
    assert scalar is not None, "turboquant is adaptive"
    above = [choice for choice in scalar(dim) if choice[0].bits > _CHOICES[-1]]
    return [(CodecSpec.of("trellis", bits), mse(bits)) for bits in _CHOICES] + above


register_codec(
    CodecInfo(
        "trellis",
        (1, 1.5, 2, 2.5, 3, 3.5, 4),
        _build,
        choices=_choices,
        read_cost=_READ_COST,
    )
)

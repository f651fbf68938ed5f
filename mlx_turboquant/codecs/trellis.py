"""Trellis-coded quantization: a level is looked up by 8 bits of a stream.

Owns the codes and tables. A vector of d elements at R bits is a circle of d * R bits,
low bits first in uint32 words (`bitstream`). Element i's window is the 8 bits from its
own on; its level is a table's entry at the low 7 of them, negated if the top one is
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

from ..bitstream import Stream
from ..rotation import rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from . import viterbi
from .base import Side, register
from .scale import Rule, scaled, unit
from .table import TableCodec
from .turboquant import usual_scale

WINDOW = 8
#: The search is in whole numbers of this part of a unit: halves cost 0.3% of error at
#: 4 bits, units 1.3%.
SHARPNESS = 2


@dataclass(frozen=True, eq=False)
class Trellis(TableCodec):
    """See the module's docstring; implements `codecs.base.Codec`.

    Args:
        scale: Which scale to store.
        widths: Own bits of an element, in turns: even ones first.
        levels: By turn and window: (turns, 256) float32, in units.
    """

    scale: Rule
    widths: tuple[int, ...]
    levels: mx.array

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (B, H, T, W) uint32, scales fp16."""
        y, rms = unit(x_rot.astype(mx.float32))
        count = 2 * self.pairs.count
        farthest = viterbi.FARTHEST
        target = mx.clip(mx.round(y / self.unit * SHARPNESS), -farthest, farthest)
        padded = mx.pad(target, [(0, 0)] * 3 + [(0, count - self.dim)])
        windows = viterbi.best_windows(self._trellis, padded.reshape(-1, count))
        pairs = windows.reshape(*y.shape[:-1], -1, 2)
        # A pair's index: the first element's window, and the second's top bits.
        index = pairs[..., 0] | (pairs[..., 1] << self.widths[0])
        scale = scaled(self.scale, rms, y, self.elements(index))
        words = self.pairs.pack(index & (2 ** self.pairs.pattern[0] - 1))
        return TokenArrays({"words": words, "scales": scale}, x_rot.shape[-2])

    @functools.cached_property
    def _trellis(self) -> viterbi.Trellis:
        # Steps run from the last element, which is odd, to the first.
        levels = np.array(self.levels)[::-1].copy() * SHARPNESS
        return viterbi.Trellis(WINDOW, self.widths[::-1], levels)


def table(bits: float) -> tuple[tuple[int, ...], mx.array]:
    """Own bits of an element, in turns, and levels (turns, 256) in units, by window."""
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


@register("trellis")
def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Trellis:
    widths, levels = table(spec.bits)
    step = float(_tables()[f"{spec.bits:g}"]["unit"])
    # As many pairs as fill words, for the circle to close.
    fill = 16 if len(widths) == 1 else 32
    pairs = Stream((round(2 * spec.bits),), -(-dim // (2 * fill)) * fill)
    index_bits = widths[0] + WINDOW
    index, whole = np.arange(2**index_bits), np.array(levels)
    both = [whole[0][index % 2**WINDOW], whole[-1][index >> widths[0]]]
    points = mx.array(np.stack(both, axis=-1))
    mx.eval(points)
    common = (spec, dim, rotation_for(dim, seed), pairs, index_bits, step, points)
    return Trellis(*common, usual_scale(side), widths, levels)

"""TurboAngle: after a random rotation, angles and norms of pairs of coordinates.

Owns the codec and the paper's settings by layer. Angles take n = round(4**bits) uniform
bins (so ``bits`` are those of the angles per element: 3.5 is 128 bins, 3 is 64),
decoded at the bin's middle. Norms of keys take 8 bits linearly, norms of values 4 bits
on a logarithmic scale, between each vector's least and largest, which are kept in fp16.

The paper counts log2(n) / 2 + norm bits / 2 + 32 / d bits an element; where n is no
power of two, more is stored, and `bits_per_vector` says how much.

Source: TurboAngle (arXiv 2603.27467), section 3 and tables 2 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..bitstream import Stream
from ..errors import UnsupportedError
from ..rotation import Rotation, rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from .base import Side, Traits, register
from .scale import FP16_BITS, fp16

_LINEAR, _LOGARITHMIC = 8, 4
#: Smallest norm that the logarithm sees, against the vector's largest.
_FLOOR = 1e-4
_BASE = (3.5, 3.0)
_BOOSTED = (4.0, 3.5)


@dataclass(frozen=True, eq=False)
class TurboAngle(Traits):
    """See the module's docstring; implements `codecs.base.Codec`.

    Args:
        norm_bits: Of a pair's norm: 8 linear ones, or 4 logarithmic ones.
        bins: Angles, any number from 2 to 2**16.
    """

    spec: CodecSpec
    dim: int
    rotation: Rotation
    norm_bits: int
    bins: int
    arrays = ("words", "scales")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words (angles, then norms) and two fp16 scales."""
        angle, norm = polar(x_rot)
        bins = bin_of(angle, self.bins)
        largest = fp16(mx.max(norm, axis=-1, keepdims=True))
        whole = largest.astype(mx.float32)
        share = norm / mx.where(whole > 0, whole, 1.0)
        least = mx.min(share, axis=-1, keepdims=True)
        if self.norm_bits == _LINEAR:
            below = fp16(mx.minimum(least, 1.0))
            span = 1 - below.astype(mx.float32)
            rank = (share - below) / mx.where(span > 0, span, 1.0)
        else:
            below = fp16(-mx.log(mx.clip(least, _FLOOR, 1.0)))
            span = below.astype(mx.float32)
            rank = 1 + mx.log(mx.maximum(share, _FLOOR)) / mx.where(span > 0, span, 1.0)
        most = 2**self.norm_bits - 1
        norms = mx.clip(mx.round(rank * most), 0, most).astype(mx.uint32)
        tail = [(0, 0)] * 3 + [(0, self.pairs.count - self.dim // 2)]
        streams = [
            self.pairs.pack(mx.pad(bins, tail)),
            self._norms.pack(mx.pad(norms, tail)),
        ]
        arrays = {
            "words": mx.concatenate(streams, axis=-1),
            "scales": mx.concatenate([largest, below], axis=-1),
        }
        return TokenArrays(arrays, x_rot.shape[-2])

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Every used token: (B, heads, length, dim), still rotated."""
        words, count = codes.view("words", heads), self.dim // 2
        bins = self.pairs.windows(words[..., : self.pairs.words])[..., :count]
        norms = self._norms.windows(words[..., self.pairs.words :])[..., :count]
        scales = codes.view("scales", heads).astype(mx.float32)
        largest, below = scales[..., :1], scales[..., 1:]
        rank = norms.astype(mx.float32) / (2**self.norm_bits - 1)
        if self.norm_bits == _LINEAR:
            share = below + (1 - below) * rank
        else:
            share = mx.exp(below * (rank - 1))
        return cartesian(middle_of(bins, self.bins), share * largest).astype(dtype)

    @property
    def pairs(self) -> Stream:
        """Angles, whole groups of 8 pairs, as kernels read them."""
        return Stream((math.ceil(math.log2(self.bins)),), -(-self.dim // 2 // 8) * 8)

    @property
    def _norms(self) -> Stream:
        return Stream((self.norm_bits,), self.pairs.count)

    @property
    def bits_per_vector(self) -> int:
        """Angles, norms, two fp16 scales; d=128, 128 bins, keys: 992, 7.75 each."""
        return 32 * (self.pairs.words + self._norms.words) + 2 * FP16_BITS


def polar(x_rot: mx.array) -> tuple[mx.array, mx.array]:
    """Angles in -pi..pi and norms (..., D / 2) float32 of consecutive pairs."""
    pairs = x_rot.astype(mx.float32).reshape(*x_rot.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return mx.arctan2(odd, even), mx.sqrt(even * even + odd * odd)


def cartesian(angle: mx.array, norm: mx.array) -> mx.array:
    """The inverse of `polar`: (..., D) float32."""
    pairs = mx.stack([norm * mx.cos(angle), norm * mx.sin(angle)], axis=-1)
    return pairs.reshape(*angle.shape[:-1], -1)


def bin_of(angle: mx.array, bins: int) -> mx.array:
    """Which of ``bins`` equal parts of the circle angles are in, uint32."""
    turn = mx.floor(angle * (bins / (2 * math.pi))).astype(mx.int32)
    return (turn % bins).astype(mx.uint32)


def middle_of(codes: mx.array, bins: int) -> mx.array:
    """The angle in the middle of each part, float32."""
    return (codes.astype(mx.float32) + 0.5) * (2 * math.pi / bins)


#: Layers with more bins, by model, as the paper's table 2 has them: (layers, their bits
#: of keys and values); all others have 128 bins for keys and 64 for values.
PAPER_SETTINGS: dict[str, tuple[Sequence[int], tuple[float, float]]] = {
    "TinyLlama-1.1B": (range(4), (3.5, 4.0)),
    "Mistral-7B": (range(4), _BOOSTED),
    "SmolLM2-1.7B": (range(20), _BOOSTED),
    "phi-1.5": ((*range(8), *range(16, 24)), _BOOSTED),
    "StableLM-2-1.6B": (range(24), _BOOSTED),
    "StarCoder2-3B": (range(16), _BOOSTED),
    "OLMo-1B": (range(4), (4.0, 3.0)),
}


def paper_specs(model: str, layers: int, options: str = "") -> list[str]:
    """The paper's early boost as one cache spec a layer, for `make_prompt_cache`.

    Args:
        model: A key of `PAPER_SETTINGS`.
        layers: How many the model has.
        options: More of every spec's text, such as ``"window=64"``.

    >>> paper_specs("Mistral-7B", 32)[3:5]
    ['k4v3.5,codec=turboangle', 'k3.5v3,codec=turboangle']
    """
    boosted, more = PAPER_SETTINGS[model]
    specs = []
    for layer in range(layers):
        k, v = more if layer in boosted else _BASE
        parts = [f"k{k:g}v{v:g}", "codec=turboangle", options]
        specs.append(",".join(part for part in parts if part))
    return specs


@register("turboangle")
def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TurboAngle:
    check_even(dim)
    norm_bits = _LINEAR if side == "keys" else _LOGARITHMIC
    return TurboAngle(
        spec, dim, rotation_for(dim, seed), norm_bits, round(4**spec.bits)
    )


def check_even(dim: int) -> None:
    """Raise for vectors that do not split into pairs."""
    if dim % 2:
        raise UnsupportedError(
            f"head_dim {dim} is odd, and pairs of coordinates are quantized",
            "use codec=turboquant",
        )

"""`Footprint`: how many bytes caches take at any length, and what that does to speed.

Owns the arithmetic from layer shapes and specs to bytes, tokens that fit and estimated
time per token. Where the shapes come from is ``integrations/footprint.py``'s.

Decoding a token reads every active weight and the whole cache once, so at best the
time of a step is that of the bytes read, with codes counted `CodecInfo.read_cost`
times: what decoding them was measured to cost over reading them (NVIDIA H200, one
attention over 131,072 tokens, dev/LOG.md; no Mac has been measured). Launches and host
work are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .backends.reference import SLICE_BYTES
from .codecs import codec_for, codec_info
from .spec import CacheSpec

#: Bytes beside weights and caches: activations of a prompt's chunk, decoded slices.
_TRANSIENT = SLICE_BYTES + (256 << 20)
_UNIT = 2  # bytes of an uncompressed element
_STEP = 128  # tokens that our buffers grow by
_PLAIN_STEP = 256  # and mlx-lm's


@dataclass(frozen=True)
class Layer:
    """One cache entry's shape.

    Attributes:
        heads: KV heads.
        k_dim: Elements of a key.
        v_dim: Elements of a value.
        window: Tokens it keeps; None for all.
        packed: Whether it can hold codes.
    """

    heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    packed: bool = True


@dataclass(frozen=True)
class Footprint:
    """A model's memory, known from its config.

    Attributes:
        layers: Its cache entries that hold keys and values.
        weights: Bytes of all weights.
        active: Bytes of the weights that one token reads.
        fixed: Bytes of caches that do not grow, such as recurrent states.
        context: Longest text it was made for, in tokens; None if unknown.
    """

    layers: Sequence[Layer]
    weights: int
    active: int
    fixed: int = 0
    context: int | None = None

    def cache_bytes(self, tokens: int, spec: CacheSpec | None = None) -> int:
        """Bytes of the caches of a text, spare capacity included."""
        return self.fixed + sum(_bytes(layer, tokens, spec)[0] for layer in self.layers)

    def tokens_in(self, memory: int, spec: CacheSpec | None = None) -> int:
        """Tokens of one text that fit in ``memory`` bytes beside the weights.

        Bounded by the context; 0 if the weights alone do not fit.
        """
        room = memory - self.weights - _TRANSIENT
        low, high = 0, self.context or 1 << 40
        if self.cache_bytes(high, spec) <= room:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.cache_bytes(middle, spec) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def speed(self, tokens: int, spec: CacheSpec) -> float | None:
        """Tokens per second after ``tokens`` at best, over those with fp16 caches.

        None for codecs that have not been timed.
        """
        costs = [codec_info(side.name).read_cost for side in (spec.keys, spec.values)]
        timed = [cost for cost in costs if cost is not None]
        if len(timed) < len(costs):
            return None
        parts = [_bytes(layer, tokens, spec) for layer in self.layers]
        codes = sum(part[1] for part in parts)
        others = sum(part[0] for part in parts) - codes
        whole = self.active + self.fixed + self.cache_bytes(tokens)
        return whole / (self.active + self.fixed + others + max(timed) * codes)


def _bytes(layer: Layer, tokens: int, spec: CacheSpec | None) -> tuple[int, int]:
    """Bytes of one entry, and how many of them are codes."""
    held = tokens if layer.window is None else min(tokens, layer.window)
    plain = layer.heads * (layer.k_dim + layer.v_dim) * _UNIT
    if spec is None or not layer.packed:
        return plain * -(-held // _PLAIN_STEP) * _PLAIN_STEP, 0
    settled = max(0, held - spec.sink - spec.window)
    if layer.window is not None and tokens > layer.window:
        settled += spec.page  # its first page may be hidden in part
    packed = settled // spec.page * spec.page
    recent = spec.sink + spec.window + spec.page + 8
    sides = (
        codec_for(spec.keys, layer.k_dim, "keys"),
        codec_for(spec.values, layer.v_dim, "values"),
    )
    code = sum(side.bits_per_vector for side in sides) / 8
    capacity = -(-packed // _STEP) * _STEP
    means = layer.k_dim * 2 / spec.page if spec.center == "page" else 0
    codes = round(layer.heads * capacity * (code + means))
    return plain * recent + codes, codes

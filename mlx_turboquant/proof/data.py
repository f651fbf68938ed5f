"""Tokens that are hard for attention kernels: made on the CPU, the same every time.

Codes are drawn from a pool of encoded vectors, each with a scale of its own, so that no
two positions hold the same and long texts cost no encoding.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from ..quantizer import Quantizer, Sides
from ..segments import CompressedTokens
from ..tokens import TILE, TokenArrays
from .key import Subject

#: plain: Gaussian. far: one token's weight is 2^14 times those of a long tail. decades:
#: scales of values over six decades.
Kind = Literal["plain", "far", "decades"]
HEADS = 2
#: Tokens before and behind the packed ones; the longest step is among the latter.
SINK, RECENT = 4, 9
_POOL = 256
#: Natural logarithm of 2^14.
_FAR_LOGIT = 9.7


class Source:
    """Makes vectors and handles for one subject; every call gives new numbers.

    Args:
        subject: What kernels are specialised for.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.dtype: mx.Dtype = getattr(mx, subject.dtype)
        self._key = mx.random.key(7)
        self._pools: dict[str, TokenArrays] = {}
        gains = (
            mx.exp(0.4 * self.normal((1, HEADS, 1, dim)))
            for dim in (subject.k_dim, subject.v_dim)
        )
        self.gains = Sides(*gains)
        mx.eval(self.gains)

    def next_key(self) -> mx.array:
        """A key for random numbers, never the same."""
        self._key, key = mx.random.split(self._key)
        return key

    def normal(self, shape: tuple[int, ...]) -> mx.array:
        """Gaussian float32."""
        return mx.random.normal(shape, key=self.next_key())

    def quantizers(self) -> Sides[Quantizer]:
        """Quantizers with gains, and no page means yet."""
        return self.subject.quantizers(self.gains)

    def queries(self, group: int, steps: int) -> mx.array:
        """Queries (1, HEADS * group, steps, Dk), near one direction for each head."""
        dim = self.subject.k_dim
        shape = 1, HEADS, group, steps, dim
        near = self.direction[:, :, None] + 0.1 * self.normal(shape)
        return near.reshape(1, HEADS * group, steps, dim).astype(self.dtype)

    @property
    def direction(self) -> mx.array:
        """What all queries of a head are near: (1, HEADS, 1, Dk) float32."""
        shape = 1, HEADS, 1, self.subject.k_dim
        return mx.random.normal(shape, key=mx.random.key(8))

    def handles(
        self, packed: int, kind: Kind
    ) -> tuple[CompressedTokens, CompressedTokens]:
        """Handles over sink, ``packed`` and recent tokens, with rubbish behind both."""
        made = []
        for side, quantizer in self.quantizers().items():
            capacity = -(-packed // TILE) * TILE
            if quantizer.means is not None:
                page = quantizer.means.page
                capacity = -(-packed // page) * page
                shape = 1, HEADS, capacity // page, self.subject.k_dim
                # Small beside the far token's logit.
                weight = 0.02 if kind == "far" else 0.3
                quantizer.means.append(weight * self.normal(shape))
            codes = self._codes(quantizer, packed, capacity, kind)
            plain = self.normal((1, HEADS, SINK + RECENT, quantizer.codec.dim))
            if kind == "far":
                plain = 0.05 * plain if side == "keys" else plain
            plain = plain.astype(self.dtype)
            behind = mx.full((1, HEADS, 13, plain.shape[3]), 3e4, self.dtype)
            recent = mx.concatenate([plain[:, :, SINK:], behind], axis=2)
            sink = mx.contiguous(plain[:, :, :SINK])
            mx.eval(sink, recent, codes.arrays)
            made.append(CompressedTokens(quantizer, sink, codes, recent, RECENT))
        keys, values = made
        return keys, values

    def _codes(
        self, quantizer: Quantizer, packed: int, capacity: int, kind: Kind
    ) -> TokenArrays:
        """Codes in tile order; those behind the last are rubbish, but finite."""
        pool = self._pool(quantizer)
        index = mx.random.randint(1, _POOL, (capacity,), key=self.next_key())
        factor = mx.exp(0.3 * self.normal((1, HEADS, capacity, 1)))
        if kind == "decades" and quantizer.side == "values":
            key = self.next_key()
            factor = 10 ** mx.random.uniform(-3, 3, factor.shape, key=key)
        if kind == "far" and quantizer.side == "keys":
            # Number 0 of the pool is the queries' direction.
            index[packed // 3], factor = 0, 0.05 * factor
            factor[:, :, packed // 3] = _FAR_LOGIT / self.subject.k_dim**0.5
        words, scales = (
            pool.view("words")[:, :, index],
            pool.view("scales")[:, :, index],
        )
        scales = (scales.astype(mx.float32) * factor).astype(mx.float16)
        if capacity > packed:
            words[:, :, packed:] = 0xFFFFFFFF
            scales[:, :, packed:] = 1e3
        layout = quantizer.layout
        words, scales = layout.to_tiles(words, scales)
        arrays = {"words": mx.contiguous(words), "scales": mx.contiguous(scales)}
        return TokenArrays(arrays, packed, layout=layout)

    def _pool(self, quantizer: Quantizer) -> TokenArrays:
        """Codes of vectors in vector order; the first is the queries' direction."""
        side = quantizer.side
        if side not in self._pools:
            x = self.normal((1, HEADS, _POOL, quantizer.codec.dim))
            if side == "keys":
                x = mx.concatenate([self.direction, x[:, :, 1:]], axis=2)
            codes = quantizer.codec.encode(quantizer.transform.encode(x))
            mx.eval(codes.arrays)
            self._pools[side] = codes
        return self._pools[side]

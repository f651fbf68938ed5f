"""Vectors kept as they are: the ``k16`` in ``k16v3``.

It spells "no compression" as a `Codec`, so that one side of a cache can stay exact
without a second kind of cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..rotation import rotation_for
from ..spec import CodecSpec
from ..tokens import TokenArrays
from .base import Codec, Side
from .registry import IDENTITY, CodecInfo, register_codec


@dataclass(frozen=True, eq=False)
class Identity(Codec):
    """Stores the model's own vectors, unrotated."""

    wants_centering = False
    wants_equalizing = False
    arrays = ("vectors",)

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Keep x_rot (B, H, T, dim) in its own dtype."""
        return TokenArrays({"vectors": x_rot})

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """The kept vectors as (B, heads, length, dim) in ``dtype``."""
        return codes.view("vectors", heads).astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """16 bits an element, as in a half-precision model."""
        return 16 * self.dim


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Identity:
    return Identity(spec, dim, rotation_for(dim, seed, "identity"))


register_codec(CodecInfo(IDENTITY, (16,), _build))

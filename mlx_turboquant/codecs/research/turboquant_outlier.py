"""TurboQuant's outlier split: two instances, a bit more for the strongest channels.

Channels come ordered by their power on the first page (`ChannelTransform`) and not
equalised; the first ``part`` of them get b + 1 bits, the others b, each part with a
rotation and a scale of its own. So 2.25 bits are a quarter of the channels at 3 and the
others at 2, which the paper calls 2.5 (32 * 3 + 96 * 2 over 128 is 2.25).

Source: TurboQuant (arXiv 2504.19874), section 4.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from ...errors import UnsupportedError
from ...rotation import MIN_DIM, SplitRotation
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..registry import CodecInfo, register_codec
from ..scale_rules import default_scale_rule
from ..turboquant import TurboQuant, turboquant


@dataclass(frozen=True, eq=False)
class TurboQuantOutlier(Codec):
    """See the module's docstring.

    Args:
        strong: Codec of the first channels.
        weak: Codec of the others.
    """

    strong: TurboQuant
    weak: TurboQuant
    wants_equalizing = False
    wants_ordering = True
    arrays = ("strong_words", "strong_scales", "weak_words", "weak_scales")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words and scales of both parts."""
        part = self.strong.dim
        strong = self.strong.encode(x_rot[..., :part])
        weak = self.weak.encode(x_rot[..., part:])
        arrays = {f"strong_{k}": v for k, v in strong.arrays.items()}
        arrays |= {f"weak_{k}": v for k, v in weak.arrays.items()}
        return TokenArrays(arrays)

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Both parts of every token in use: (B, heads, length, dim), still rotated."""
        parts = []
        for name, codec in (("strong", self.strong), ("weak", self.weak)):
            own = {k: codes.arrays[f"{name}_{k}"] for k in codec.arrays}
            parts.append(codec.decode(TokenArrays(own, codes.length), dtype, heads))
        return mx.concatenate(parts, axis=-1)

    @property
    def bits_per_vector(self) -> int:
        """Words and two fp16 scales; d=128 at 2.25 bits: 320, or 2.5 an element."""
        return self.strong.bits_per_vector + self.weak.bits_per_vector


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TurboQuantOutlier:
    low = math.floor(spec.bits)
    part = round((spec.bits - low) * dim)
    if min(part, dim - part) < MIN_DIM:
        raise UnsupportedError(
            f"head_dim {dim} splits into {part} and {dim - part} channels at "
            f"{spec.bits:g} bits, and a rotation needs {MIN_DIM}",
            "use codec=turboquant",
        )
    rotation, rule = SplitRotation(dim, part, seed), default_scale_rule(side)
    first, second = rotation.halves
    strong = turboquant(spec, part, low + 1, first, rule)
    weak = turboquant(spec, dim - part, low, second, rule)
    return TurboQuantOutlier(spec, dim, rotation, strong, weak)


_WIDTHS = tuple(quarters / 4 for quarters in range(4, 29) if quarters % 4)
register_codec(CodecInfo("research.turboquant-outlier", _WIDTHS, _build))

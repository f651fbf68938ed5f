"""Residual coding: TurboQuant of what TurboQuant left, in any number of stages.

Each stage rotates anew (what is left of a coordinate is no longer Gaussian) and has a
least-squares scale. By default the first stage has the larger half of the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..registry import CodecInfo, register_codec
from ..turboquant import TurboQuant, turboquant


@dataclass(frozen=True, eq=False)
class Residual(Codec):
    """See the module's docstring.

    Args:
        stages: Codecs, the coarsest first; the rotation is the first one's.
    """

    stages: tuple[TurboQuant, ...]

    @property
    def arrays(self) -> tuple[str, ...]:
        """Words and scales of every stage."""
        numbers = range(len(self.stages))
        return tuple(f"{name}_{i}" for i in numbers for name in ("words", "scales"))

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words and fp16 scales of every stage."""
        remainder = self.rotation.inverse(x_rot)
        arrays: dict[str, mx.array] = {}
        for i, stage in enumerate(self.stages):
            codes = stage.encode(stage.rotation.forward(remainder))
            remainder = remainder - _decode_stage(stage, codes)
            arrays |= {f"{name}_{i}": array for name, array in codes.arrays.items()}
        return TokenArrays(arrays)

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """The sum of all stages: (B, heads, length, dim), still rotated."""
        total: mx.array | None = None
        for i, stage in enumerate(self.stages):
            own = {name: codes.arrays[f"{name}_{i}"] for name in stage.arrays}
            part = _decode_stage(stage, TokenArrays(own, codes.length), heads)
            total = part if total is None else total + part
        assert total is not None, "there is a stage"
        return self.rotation.forward(total).astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """Bits of all stages; d=128 at 2 + 1 bits: 416, or 3.25 an element."""
        return sum(stage.bits_per_vector for stage in self.stages)


def _decode_stage(
    stage: TurboQuant, codes: TokenArrays, heads: slice = slice(None)
) -> mx.array:
    """What a stage adds, (B, heads, length, dim) float32, in the model's basis."""
    return stage.rotation.inverse(stage.decode(codes, mx.float32, heads))


def residual(spec: CodecSpec, dim: int, seed: int, stages: tuple[int, ...]) -> Residual:
    """Residual coding with so many bits in each stage.

    >>> residual(CodecSpec("research.residual", 4), 64, 0, (2, 1, 1)).bits_per_vector
    304
    """
    codecs = []
    for i, bits in enumerate(stages):
        rotation = rotation_for(dim, (seed + i) % 2**32)
        codecs.append(turboquant(spec, dim, bits, rotation, "least-squares"))
    return Residual(spec, dim, codecs[0].rotation, tuple(codecs))


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Residual:
    bits = int(spec.bits)
    return residual(spec, dim, seed, (bits - bits // 2, bits // 2))


register_codec(CodecInfo("research.residual", tuple(range(2, 9)), _build))

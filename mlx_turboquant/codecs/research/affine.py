"""MLX's own group quantization, behind the protocol: for comparison.

Groups along the channels have a scale and a bias each, as in ``mlx_lm --kv-bits``;
nothing is rotated, centred or equalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ...errors import UnsupportedError
from ...rotation import rotation_for
from ...spec import CodecSpec
from ...tokens import TokenArrays
from ..base import Codec, Side
from ..registry import CodecInfo, register_codec
from ..scale_rules import FP16_BITS

#: Group sizes that MLX has, the largest that divides a dim first.
_GROUPS = (64, 32)
#: Differences of two such numbers are still finite in fp16.
_LARGEST = 32000.0


@dataclass(frozen=True, eq=False)
class Affine(Codec):
    """See the module's docstring.

    Args:
        group: Elements that share a scale and a bias.
    """

    group: int
    wants_centering = False
    wants_equalizing = False
    arrays = ("words", "scales", "biases")

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Vectors (B, H, T, dim) to words, scales and biases, both fp16."""
        bits = int(self.spec.bits)
        half = mx.clip(x_rot, -_LARGEST, _LARGEST).astype(mx.float16)
        words, scales, biases = mx.quantize(half, group_size=self.group, bits=bits)
        return TokenArrays({"words": words, "scales": scales, "biases": biases})

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """Every token in use: (B, heads, length, dim)."""
        words, scales, biases = (codes.view(name, heads) for name in self.arrays)
        bits = int(self.spec.bits)
        x = mx.dequantize(words, scales, biases, group_size=self.group, bits=bits)
        return x.astype(dtype)

    @property
    def bits_per_vector(self) -> int:
        """Codes and two fp16 numbers a group; d=128 at 4 bits: 576, 4.5 an element."""
        groups = self.dim // self.group
        return int(self.spec.bits) * self.dim + 2 * FP16_BITS * groups


def _build(spec: CodecSpec, dim: int, side: Side, seed: int) -> Affine:
    group = next((size for size in _GROUPS if dim % size == 0), None)
    if group is None:
        raise UnsupportedError(
            f"head_dim {dim} is no multiple of {_GROUPS[-1]}, MLX's smallest group",
            "use codec=rotated-int4 or codec=turboquant",
        )
    return Affine(spec, dim, rotation_for(dim, seed, "identity"), group)


register_codec(CodecInfo("research.affine", (2, 3, 4, 5, 6, 8), _build))

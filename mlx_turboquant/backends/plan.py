"""What the attention kernels are specialised for: all that no step changes.

Owns templates and constant buffers of a (codecs, heads, steps, dtype), made once.
What changes with every token is `gpu`'s.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..codecs.turboquant import TurboQuant
from ..polynomial import TERMS, decoder_table
from ..rotation import Rotation

LOG2E = math.log2(math.e)
#: Largest head_dim of any kernel: registers and threadgroup memory are laid out for it.
MAX_DIM = 512
#: Query rows a simdgroup takes at once: ``ROWS`` of decode_attention.metal.
_ROWS = 8
#: Simdgroups to a threadgroup, in pass 1 and in pass 2.
BLOCK_SIMDGROUPS, MERGE_SIMDGROUPS = 4, 8


def rotates(rotation: Rotation) -> bool:
    """Whether the kernels can apply ``rotation``: Hadamard of a power of two."""
    dim = rotation.dim
    return rotation.kind == "hadamard" and dim >= 32 and dim & (dim - 1) == 0


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a call that does not change from step to step.

    Attributes:
        rotate_q: For q before the kernels, where they cannot do it themselves.
        rotate_out: Likewise for undoing the values' rotation.
        rows: Query rows per KV head.
        block: Template of pass 1.
        merge: Template of pass 2.
        decoders: What pass 1 decodes keys and values with.
        signs: Of the keys' and the values' rotation.
        q_scale: From an unnormalised rotation to logits in log2 units.
        zeros: In place of arrays a call has not; at least one key mean's size.
    """

    rotate_q: Rotation | None
    rotate_out: Rotation | None
    rows: int
    block: dict[str, Any]
    merge: dict[str, Any]
    decoders: tuple[mx.array, mx.array]
    signs: tuple[mx.array, mx.array]
    q_scale: mx.array
    zeros: mx.array


@functools.lru_cache(maxsize=256)
def plan_for(
    k_codec: TurboQuant,
    v_codec: TurboQuant,
    dtype: mx.Dtype,
    heads: tuple[int, int, int],
    steps: int,
    scale: float,
    masked: bool,
    learned: bool,
) -> Plan:
    """heads: batch, KV heads, query heads."""
    batch, kv_heads, query_heads = heads
    k_rotation, v_rotation = k_codec.rotation, v_codec.rotation
    rows = query_heads // kv_heads * steps
    common = {
        "T": dtype,
        "DK": k_codec.dim,
        "DV": v_codec.dim,
        "ROTATE_K": rotates(k_rotation),
        "MASKED": masked,
    }
    block = {
        **common,
        "ROW_TILES": -(-rows // _ROWS),
        "SIMDGROUPS": BLOCK_SIMDGROUPS,
    }
    for side, bits in (("K", k_codec.spec.bits), ("V", v_codec.spec.bits)):
        block[f"{side}B"] = bits
        block[f"{side}_TERMS"] = TERMS[bits]
    merge = {
        **common,
        "SIMDGROUPS": MERGE_SIMDGROUPS,
        "ROTATE_V": rotates(v_rotation),
        "LEARNED": learned,
    }
    unit = k_codec.dim**-0.5 if rotates(k_rotation) else 1.0
    arrays = {
        "k": mx.array(decoder_table(k_codec.dim, k_codec.spec.bits)),
        "v": mx.array(decoder_table(v_codec.dim, v_codec.spec.bits)),
        "q_scale": mx.full((8,), scale * LOG2E * unit),
        "zeros": mx.zeros((batch * kv_heads * k_codec.dim,)),
    }
    mx.eval(arrays)
    return Plan(
        rotate_q=None if rotates(k_rotation) else k_rotation,
        rotate_out=None if rotates(v_rotation) else v_rotation,
        rows=rows,
        block=block,
        merge=merge,
        decoders=(arrays["k"], arrays["v"]),
        signs=(k_rotation.signs, v_rotation.signs),
        q_scale=arrays["q_scale"],
        zeros=arrays["zeros"],
    )


@functools.lru_cache(maxsize=64)
def sizes_array(numbers: tuple[int, ...]) -> mx.array:
    """An int32 constant of at least 8 elements; all layers of a step share it."""
    return mx.array([*numbers, *[0] * (8 - len(numbers))], dtype=mx.int32)

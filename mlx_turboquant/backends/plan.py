"""What the attention kernels are specialised for: all that no step changes.

Owns templates and constant buffers of a (codecs, heads, steps, dtype), made once.
What changes with every token is `gpu`'s.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeGuard

import mlx.core as mx

from ..codecs import Codec
from ..rotation import Rotation, SplitRotation
from ..transform import ChannelTransform

LOG2E = math.log2(math.e)
#: Largest head_dim of any kernel: registers and threadgroup memory are laid out for it.
MAX_DIM = 512
#: Query rows a simdgroup takes at once: ``ROWS`` of decode_attention.metal.
_ROWS = 8
#: Simdgroups to a threadgroup, in pass 1 and in pass 2.
BLOCK_SIMDGROUPS, MERGE_SIMDGROUPS = 4, 8


def rotates(rotation: Rotation | SplitRotation) -> TypeGuard[Rotation]:
    """Whether the kernels can apply ``rotation``: Hadamard of a power of two."""
    dim = rotation.dim
    return rotation.kind == "hadamard" and dim >= 32 and dim & (dim - 1) == 0


@dataclass(frozen=True, eq=False)
class Plan:
    """All of a call that does not change from step to step.

    Attributes:
        inside: Whether the kernels rotate, of keys and of values; else it is done
            before and after them.
        rows: Query rows per KV head.
        block: Template of pass 1.
        merge: Template of pass 2.
        decoders: What pass 1 decodes keys and values with.
        q_scales: From q to logits in log2 units: rotated without norm, and plain.
    """

    inside: tuple[bool, bool]
    rows: int
    block: dict[str, Any]
    merge: dict[str, Any]
    decoders: tuple[mx.array, mx.array]
    q_scales: tuple[mx.array, mx.array]


@functools.lru_cache(maxsize=256)
def plan_for(
    k_codec: Codec,
    v_codec: Codec,
    dtype: mx.Dtype,
    heads: tuple[int, int, int],
    steps: int,
    scale: float,
    masked: bool,
    learned: bool,
    centered: bool,
) -> Plan:
    """heads: batch, KV heads, query heads."""
    _, kv_heads, query_heads = heads
    inside = (rotates(k_codec.rotation), rotates(v_codec.rotation))
    rows = query_heads // kv_heads * steps
    common = {
        "T": dtype,
        "DK": k_codec.dim,
        "DV": v_codec.dim,
        "MASKED": masked,
    }
    k_format, v_format = k_codec.kernel_format, v_codec.kernel_format
    assert k_format is not None
    assert v_format is not None
    formats = (k_format, v_format)
    # One table serves both sides, if they have one and it is the same.
    same = k_codec.spec == v_codec.spec and formats[0].has_table
    block = {
        **common,
        "ROTATE_K": inside[0],
        "CENTER": centered,
        "ROW_TILES": -(-rows // _ROWS),
        "SAME": same,
        "ALONE": same or not all(format.has_table for format in formats),
        "SIMDGROUPS": BLOCK_SIMDGROUPS,
    }
    for side, format in zip("KV", formats, strict=True):
        block[f"{side}_KIND"] = format.kind
        block[f"{side}B"] = format.bits
        block[f"{side}_TERMS"] = format.terms
    merge = {
        **common,
        "SIMDGROUPS": MERGE_SIMDGROUPS,
        "ROTATE_V": inside[1],
        "LEARNED": learned,
    }
    unit = k_codec.dim**-0.5 if inside[0] else 1.0
    arrays = {
        "q_rot_scale": mx.full((8,), scale * LOG2E * unit),
        "q_scale": mx.full((8,), scale * LOG2E),
    }
    mx.eval(arrays)
    return Plan(
        inside=inside,
        rows=rows,
        block=block,
        merge=merge,
        decoders=(k_format.params, v_format.params),
        q_scales=(arrays["q_rot_scale"], arrays["q_scale"]),
    )


def signs_of(basis: ChannelTransform, heads: int, out: bool) -> mx.array:
    """A basis's signs times (``out``) or over its gains, for each of ``heads``.

    One contiguous row of D per batch and KV head, or zeros if no kernel rotates.
    """
    if not rotates(basis.rotation):
        return zeros()
    if basis.gains is None:
        return _equal_signs(basis.rotation, heads)
    return basis.signs_times_gains if out else basis.signs_over_gains


@functools.cache
def zeros(dtype: mx.Dtype = mx.float32) -> mx.array:
    """In place of an array that a call has not: 8 elements, or it would be constant."""
    array = mx.zeros((8,), dtype)
    mx.eval(array)
    return array


@functools.lru_cache(maxsize=64)
def _equal_signs(rotation: Rotation, heads: int) -> mx.array:
    signs = mx.contiguous(mx.broadcast_to(rotation.signs, (heads, rotation.dim)))
    mx.eval(signs)
    return signs


@functools.lru_cache(maxsize=64)
def sizes_array(numbers: tuple[int, ...]) -> mx.array:
    """An int32 constant of at least 8 elements; all layers of a step share it."""
    return mx.array([*numbers, *[0] * (8 - len(numbers))], dtype=mx.int32)

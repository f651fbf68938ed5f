"""Decode attention on packed codes, in two kernel launches.

Owns the translation of a call into launches: rows, blocks, sizes, templates. The
arithmetic is in ``metal/decode_attention.metal`` and ``metal/merge_blocks.metal``;
`reference` is what it is held to.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mlx.core as mx

from ..codecs.turboquant import TurboQuant
from ..kernels.kernel import Kernel, Launcher
from ..kernels.polynomial import TERMS, decoder_table
from ..segments import Segments

MAX_ROWS = 8
MAX_DIM = 512
_TILE = 32
_LOG2E = math.log2(math.e)
#: Query rows a simdgroup keeps in registers.
_ROWS = 4
#: Simdgroups to a threadgroup, in pass 1 and in pass 2.
_BLOCK_SIMDGROUPS, _MERGE_SIMDGROUPS = 4, 8

ATTEND_BLOCK = Kernel(
    name="attend_block",
    file="decode_attention.metal",
    inputs=(
        "q",
        "k_words",
        "k_scales",
        "v_words",
        "v_scales",
        "mask",
        "k_given",
        "v_given",
        "q_scale",
        "sizes",
    ),
    outputs=("partial",),
    entry="""
    threadgroup float k_table[K_TABLE];
    threadgroup float v_table[V_TABLE];
    uint3 group = threadgroup_position_in_grid;
    uint index = thread_index_in_threadgroup;
    Levels<KB, K_TERMS> k_levels =
        make_levels<KB, K_TERMS>(k_given, k_table, index, 32 * SIMDGROUPS);
    Levels<VB, V_TERMS> v_levels =
        make_levels<VB, V_TERMS>(v_given, v_table, index, 32 * SIMDGROUPS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Sizes all = {sizes[0], sizes[1], sizes[2], sizes[3],
                 sizes[4], sizes[5], sizes[6], sizes[7]};
    uint block = group.x * SIMDGROUPS + simdgroup_index_in_threadgroup;
    if (block < uint(all.blocks)) {
      attend_block<T, DK, DV, KB, VB, K_TERMS, V_TERMS, ROWS, MASKED>(
          q, q_scale[0], k_words, k_scales, v_words, v_scales, mask, k_levels,
          v_levels, all, partial, block, group.y / ROW_TILES, group.y % ROW_TILES,
          group.z, thread_index_in_simdgroup);
    }
    """,
)
MERGE_ROW = Kernel(
    name="merge_row",
    file="merge_blocks.metal",
    inputs=(
        "q",
        "partial",
        "sink_keys",
        "sink_values",
        "recent_keys",
        "recent_values",
        "mean",
        "mask",
        "learned",
        "q_scale",
        "sizes",
    ),
    outputs=("out",),
    entry="""
    threadgroup float scratch[SIMDGROUPS * (DV + 2)];
    MergeSizes all = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                      sizes[5], sizes[6], sizes[7], sizes[8]};
    merge_row<T, DK, DV, SIMDGROUPS, MASKED, LEARNED>(
        q, q_scale[0], partial, sink_keys, sink_values, recent_keys, recent_values,
        mean, mask, learned, all, out, scratch, threadgroup_position_in_grid.y,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """,
)


def refuse(steps: int, keys: Segments, values: Segments) -> str | None:
    """Why these kernels cannot take ``steps`` query rows, or None if they can."""
    if keys.packed is None or values.packed is None:
        return "nothing is packed yet"
    for side in (keys, values):
        if not isinstance(side.codec, TurboQuant):
            return f"codec {side.codec.spec} has no kernel"
        if side.codec.dim > MAX_DIM:
            return f"head_dim {side.codec.dim} is over {MAX_DIM}"
    if steps > MAX_ROWS:
        return f"a step of {steps} tokens is over {MAX_ROWS}"
    return None


@dataclass(frozen=True)
class Gpu:
    """Attention kernels on one launcher.

    Args:
        launcher: What runs them.
        blocks: Parts that the packed tokens of a KV head are split into, at most;
            enough to fill the machine over all heads.
    """

    launcher: Launcher
    blocks: int = 128

    @property
    def name(self) -> str:
        """What `explain` calls it."""
        return self.launcher.name

    def attend_rot(
        self,
        q_rot: mx.array,
        keys: Segments,
        values: Segments,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As `reference.attend_rot`, for calls that `refuse` has nothing against."""
        batch, heads, total, k_dim = keys.shape
        v_dim, steps = values.shape[3], q_rot.shape[2]
        rows = q_rot.shape[1] // heads * steps
        q = q_rot.astype(keys.dtype).reshape(batch, -1, k_dim)
        bias = self._bias(mask, batch, heads * rows, q_rot.shape, total)
        partial = self._attend_blocks(q, scale, keys, values, rows, bias)
        learned = None
        if sinks is not None:
            wide = (sinks.astype(mx.float32) * _LOG2E)[None, :, None]
            learned = mx.broadcast_to(wide, (batch, q_rot.shape[1], steps))
            learned = mx.pad(learned.reshape(-1), (0, 8))  # at least 8 elements
        causal = isinstance(mask, str) and steps > 1
        out = self._merge(
            q, scale, partial, keys, values, (rows, steps, causal), bias, learned
        )
        return out.reshape(batch, -1, steps, v_dim).astype(q_rot.dtype)

    def _bias(
        self,
        mask: mx.array | str | None,
        batch: int,
        rows: int,
        q_shape: tuple[int, ...],
        total: int,
    ) -> mx.array | None:
        """An array mask as additive float32 (batch, heads * rows, total), log2."""
        if not isinstance(mask, mx.array):
            return None
        if mask.dtype == mx.bool_:
            mask = mx.where(mask, 0.0, -math.inf)
        wide = mx.broadcast_to(mask.astype(mx.float32), (*q_shape[:3], total))
        return mx.contiguous(wide * _LOG2E).reshape(batch, rows, total)

    def _attend_blocks(
        self,
        q: mx.array,
        scale: float,
        keys: Segments,
        values: Segments,
        rows: int,
        bias: mx.array | None,
    ) -> mx.array:
        assert keys.packed is not None
        assert values.packed is not None
        batch, heads, total, k_dim = keys.shape
        v_dim = values.shape[3]
        length = keys.packed.length
        tiles = -(-length // _TILE)
        run = -(-tiles // min(self.blocks, tiles)) * _TILE
        blocks = -(-length // run)
        capacity = keys.packed.arrays["words"].shape[2]
        sizes = (length, capacity, blocks, run, heads, rows, keys.sink_length, total)
        per_tile = min(_ROWS, rows)
        row_tiles = -(-rows // per_tile)
        groups = -(-blocks // _BLOCK_SIMDGROUPS)
        k_bits, v_bits = keys.codec.spec.bits, values.codec.spec.bits
        template = {
            "T": q.dtype,
            "DK": k_dim,
            "DV": v_dim,
            "KB": k_bits,
            "VB": v_bits,
            "K_TERMS": TERMS[k_bits],
            "V_TERMS": TERMS[v_bits],
            "K_TABLE": 1 if TERMS[k_bits] else 2**k_bits,
            "V_TABLE": 1 if TERMS[v_bits] else 2**v_bits,
            "ROWS": per_tile,
            "ROW_TILES": row_tiles,
            "SIMDGROUPS": _BLOCK_SIMDGROUPS,
            "MASKED": bias is not None,
        }
        inputs = [
            q,
            keys.packed.arrays["words"],
            keys.packed.arrays["scales"],
            values.packed.arrays["words"],
            values.packed.arrays["scales"],
            _given((0.0,) * 8) if bias is None else bias,
            _given(decoder_table(k_dim, k_bits)),
            _given(decoder_table(v_dim, v_bits)),
            _given((scale * _LOG2E,) * 8),
            _sizes(sizes),
        ]
        threads = 32 * _BLOCK_SIMDGROUPS
        return self.launcher(
            ATTEND_BLOCK,
            inputs,
            template,
            grid=(threads * groups, heads * row_tiles, batch),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, heads * rows, blocks, v_dim + 2)],
            output_dtypes=[mx.float32],
        )[0]

    def _merge(
        self,
        q: mx.array,
        scale: float,
        partial: mx.array,
        keys: Segments,
        values: Segments,
        shape: tuple[int, int, bool],
        bias: mx.array | None,
        learned: mx.array | None,
    ) -> mx.array:
        batch, heads, total, k_dim = keys.shape
        v_dim = values.shape[3]
        rows, steps, causal = shape
        sizes = (
            partial.shape[2],
            rows,
            steps,
            keys.sink_length,
            keys.recent.shape[2],
            keys.recent.shape[2],
            int(causal),
            keys.packed_length,
            total,
        )
        mean = keys.mean
        if mean is None:
            mean = _given((0.0,) * (batch * heads * k_dim))
        template = {
            "T": keys.dtype,
            "DK": k_dim,
            "DV": v_dim,
            "SIMDGROUPS": _MERGE_SIMDGROUPS,
            "MASKED": bias is not None,
            "LEARNED": learned is not None,
        }
        inputs = [
            q,
            partial,
            keys.recent if keys.sink is None else keys.sink,
            values.recent if values.sink is None else values.sink,
            keys.recent,
            values.recent,
            mean,
            _given((0.0,) * 8) if bias is None else bias,
            _given((0.0,) * 8) if learned is None else learned,
            _given((scale * _LOG2E,) * 8),
            _sizes(sizes),
        ]
        return self.launcher(
            MERGE_ROW,
            inputs,
            template,
            grid=(32 * _MERGE_SIMDGROUPS, batch * heads * rows, 1),
            threadgroup=(32 * _MERGE_SIMDGROUPS, 1, 1),
            output_shapes=[(batch, heads * rows, v_dim)],
            output_dtypes=[q.dtype],
        )[0]


@functools.lru_cache(maxsize=256)
def _given(numbers: tuple[float, ...]) -> mx.array:
    """A float32 constant, made once."""
    array = mx.array(numbers, dtype=mx.float32)
    mx.eval(array)
    return array


@functools.lru_cache(maxsize=64)
def _sizes(numbers: tuple[int, ...]) -> mx.array:
    """An int32 constant; all layers of a step share it."""
    return mx.array(numbers, dtype=mx.int32)

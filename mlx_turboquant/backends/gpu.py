"""The GPU backend: fused decode attention in two launches, prefill by decoding.

Owns the translation of an attention call into launches: rows, blocks, sizes. The
arithmetic is in ``metal/decode_attention.metal`` and ``metal/merge_blocks.metal``;
`reference` is what it is held to. Moving tokens in and out of codes is `tokens`'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import mlx.core as mx

from ..codecs import Codec
from ..kernels.decode_attention import ATTEND_BLOCK, MERGE_ROW
from ..kernels.kernel import Launcher
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from ..transform import ChannelTransform, PageMeans
from . import gpu_codes, reference
from .plan import (
    BLOCK_SIMDGROUPS,
    LOG2E,
    MERGE_SIMDGROUPS,
    Plan,
    plan_for,
    signs_of,
    sizes_array,
    zeros,
)

#: Query tokens that one fused step takes; more of them are prefill.
MAX_ROWS = 8
_TILE = 32


def refuse(keys: CompressedTokens, values: CompressedTokens) -> str | None:
    """Why these kernels cannot attend to what is stored, or None if they can."""
    if keys.packed is None or values.packed is None:
        return "nothing is packed yet"
    means = keys.means
    if means is not None and means.count > 1 and means.page % _TILE:
        return f"page {means.page} is not a multiple of {_TILE}"
    return gpu_codes.refuse(keys.codec, values.codec)


@dataclass(frozen=True)
class Gpu:
    """Attention kernels on one launcher.

    Args:
        launcher: What runs them.
        simdgroups: How many pass 1 may use over all heads; enough to fill the machine.
    """

    launcher: Launcher
    simdgroups: int = 512

    @property
    def name(self) -> str:
        """What `explain` calls it."""
        return self.launcher.name

    def attend(
        self,
        q: mx.array,
        keys: CompressedTokens,
        values: CompressedTokens,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As `reference.attend`, for what `refuse` has nothing against.

        Up to `MAX_ROWS` query tokens are fused; with more, the codes are decoded by a
        kernel and attended as the reference does.
        """
        if q.shape[2] > MAX_ROWS:
            return reference.attend(q, keys, values, scale, mask, sinks, self.decode)
        return self._attend_fused(q, keys, values, scale, mask, sinks)

    def decode(self, side: CompressedTokens, heads: slice, dtype: mx.Dtype) -> mx.array:
        """As `reference.decode`, by a kernel."""
        assert side.packed is not None
        return gpu_codes.decode(self.launcher, side.codec, side.packed, dtype, heads)

    def encode(
        self,
        keys: mx.array,
        values: mx.array,
        means: PageMeans | None,
        first: int,
        bases: tuple[ChannelTransform, ChannelTransform],
        codecs: tuple[Codec, Codec],
    ) -> tuple[TokenArrays, TokenArrays]:
        """As `reference.encode`; codecs without a kernel are left to it."""
        return gpu_codes.encode(
            self.launcher, keys, values, means, first, bases, codecs
        )

    def _attend_fused(
        self,
        q: mx.array,
        keys: CompressedTokens,
        values: CompressedTokens,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        k_codec, v_codec = keys.codec, values.codec
        batch, heads, total, _ = keys.shape
        query_heads, steps = q.shape[1:3]
        counts = (batch, heads, query_heads)
        bias = _bias(mask, (batch, query_heads, steps, total))
        learned = None if sinks is None else _learned(sinks, batch, steps)
        plan = plan_for(
            k_codec,
            v_codec,
            keys.dtype,
            counts,
            steps,
            scale,
            bias is not None,
            learned is not None,
            keys.means is not None,
        )
        dtype = q.dtype
        k_basis, v_basis = keys.basis, values.basis
        # Where no kernel rotates, everything is taken into the codes' basis here.
        if not plan.inside[0]:
            q = k_basis.encode_query(q)
            keys = _unpacked_into_basis(keys)
        if not plan.inside[1]:
            values = _unpacked_into_basis(values)
        if q.dtype != keys.dtype:
            q = q.astype(keys.dtype)
        bias = zeros() if bias is None else bias
        sums, tops = self._attend_blocks(plan, q, keys, values, counts, bias)
        causal = isinstance(mask, str) and steps > 1
        out = self._merge(plan, q, (sums, tops), keys, values, bias, learned, causal)
        if not plan.inside[1]:
            out = v_basis.decode(out)
        return out if out.dtype == dtype else out.astype(dtype)

    def _attend_blocks(
        self,
        plan: Plan,
        q: mx.array,
        keys: CompressedTokens,
        values: CompressedTokens,
        counts: tuple[int, int, int],
        bias: mx.array,
    ) -> list[mx.array]:
        """Pass 1: unnormalised sums, and their maxima and denominators."""
        assert keys.packed is not None
        assert values.packed is not None
        batch, heads, query_heads = counts
        length = keys.packed.length
        lanes = batch * heads * plan.block["ROW_TILES"]
        tiles = -(-length // _TILE)
        blocks = min(tiles, max(1, self.simdgroups // lanes))
        run = -(-tiles // blocks) * _TILE
        blocks = -(-length // run)
        rows, steps = plan.rows, q.shape[2]
        first, columns = keys.sink_length, bias.shape[-1]
        means = keys.means
        sizes = sizes_array(
            (
                *(length, blocks, run, heads, rows, steps, first, columns),
                means.page if means else 1,
            )
        )
        threads = 32 * BLOCK_SIMDGROUPS
        partial = batch * query_heads * steps * blocks
        return self.launcher(
            ATTEND_BLOCK,
            [
                q,
                *_whole_tiles(keys.packed, tiles),
                *_whole_tiles(values.packed, tiles),
                bias,
                means.rows if means else zeros(mx.float16),
                *plan.decoders,
                signs_of(keys.basis, batch * heads, out=True),
                plan.q_scales[0],
                sizes,
            ],
            plan.block,
            grid=(
                threads * -(-blocks // BLOCK_SIMDGROUPS),
                heads * plan.block["ROW_TILES"],
                batch,
            ),
            threadgroup=(threads, 1, 1),
            # Buffers of fewer than 8 elements would be constant memory in pass 2.
            output_shapes=[(partial, values.codec.dim), (max(4, partial), 2)],
            output_dtypes=[mx.float32, mx.float32],
        )

    def _merge(
        self,
        plan: Plan,
        q: mx.array,
        partial: tuple[mx.array, mx.array],
        keys: CompressedTokens,
        values: CompressedTokens,
        bias: mx.array,
        learned: mx.array | None,
        causal: bool,
    ) -> mx.array:
        """Pass 2: the output, in the keys' dtype."""
        batch, query_heads, steps, _ = q.shape
        sizes = (
            partial[0].shape[0] // (batch * query_heads * steps),
            plan.rows,
            steps,
            keys.sink_length,
            keys.recent.shape[2],
            int(causal),
            keys.packed_length,
            bias.shape[-1],
            keys.recent.shape[1],
        )
        threads = 32 * MERGE_SIMDGROUPS
        return self.launcher(
            MERGE_ROW,
            [
                q,
                *partial,
                keys.recent if keys.sink is None else keys.sink,
                values.recent if values.sink is None else values.sink,
                keys.recent,
                values.recent,
                bias,
                zeros() if learned is None else learned,
                signs_of(values.basis, batch * keys.shape[1], out=True),
                plan.q_scales[1],
                sizes_array(sizes),
            ],
            plan.merge,
            grid=(threads, batch * query_heads * steps, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, query_heads, steps, values.codec.dim)],
            output_dtypes=[q.dtype],
        )[0]


def _unpacked_into_basis(side: CompressedTokens) -> CompressedTokens:
    """With sink and recent tokens in the codes' basis, dtype kept."""
    into, dtype = side.basis.encode, side.recent.dtype
    sink = None if side.sink is None else into(side.sink).astype(dtype)
    return replace(side, sink=sink, recent=into(side.recent).astype(dtype))


def _whole_tiles(codes: TokenArrays, tiles: int) -> list[mx.array]:
    """Words and scales whose capacity reaches to the end of the last tile.

    The kernel reads there and counts it for nothing. A cache's buffers always do.
    """
    arrays = [codes.arrays["words"], codes.arrays["scales"]]
    missing = tiles * _TILE - arrays[0].shape[2]
    if missing <= 0:
        return arrays
    return [mx.pad(a, [(0, 0), (0, 0), (0, missing), (0, 0)]) for a in arrays]


def _bias(
    mask: mx.array | str | None, shape: tuple[int, int, int, int]
) -> mx.array | None:
    """An array mask as additive float32 of ``shape``, log2 units."""
    if not isinstance(mask, mx.array):
        return None
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -math.inf)
    return mx.contiguous(mx.broadcast_to(mask.astype(mx.float32), shape) * LOG2E)


def _learned(sinks: mx.array, batch: int, steps: int) -> mx.array:
    """Sink logits (Hq,) per query row, log2 units, at least 8 of them."""
    wide = (sinks.astype(mx.float32) * LOG2E)[None, :, None]
    rows = mx.broadcast_to(wide, (batch, sinks.shape[0], steps))
    return mx.pad(rows.reshape(-1), (0, 8))

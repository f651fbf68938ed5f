"""`DecodeStep`: the two launches of a layer's decode attention, prepared per page.

    DECODE_SPLIT_KV   attends to the tokens in splits, to sink and recent ones in the
                      model's basis: partial outputs and log-sum-exp states of each
    MERGE_STATES      takes those of packed tokens out of the codes' basis, adds learned
                      sink logits, and normalises

Between two pages only q, the buffers of recent tokens and their length change. All else
is in here: templates, grids, constant buffers, the packed codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable

import mlx.core as mx

from ..kernels.arguments import pack, pack_rows
from ..kernels.attention import MERGE_STATES, AttendArguments, split_kv_kernel
from ..kernels.kernel import Launch, Launcher
from ..segments import CompressedTokens
from ..tokens import TILE
from . import specialize
from .call import AttendCall
from .geometry import tokens_per_split
from .reference import packed_of
from .specialize import LOG2E, MERGE_SIMDGROUPS, placeholder

#: Numbers of recent tokens whose arguments are made at once: a page and more.
_BLOCK = 256
#: 1 where the arguments have the number of recent tokens, else 0.
_RECENT = AttendArguments(*(int(f == "recent") for f in AttendArguments._fields))


def kind_of(call: AttendCall) -> tuple[Hashable, ...]:
    """What calls that one `DecodeStep` serves have in common."""
    mask = call.mask
    return (
        call.q.shape,
        call.keys.recent.shape[2],
        call.scale,
        "array" if isinstance(mask, mx.array) else mask,
        call.sink_logits is None,
    )


class DecodeStep:
    """Attends for every call that differs from the first in q and recent tokens only.

    Args:
        launcher: What runs the kernels.
        call: The first call of its kind over these packed tokens.
        simdgroups: How many pass 1 may use over all heads; enough to fill the machine.
        multiply_adds: Whether few query rows take multiply-adds or matrix products;
            None for what is better there.
    """

    def __init__(
        self,
        launcher: Launcher,
        call: AttendCall,
        simdgroups: int,
        multiply_adds: bool | None = None,
    ) -> None:
        self._launcher = launcher
        q, keys, values = call.q, call.keys, call.values
        k_quantizer, v_quantizer = keys.quantizer, values.quantizer
        batch, query_heads, steps, _ = q.shape
        kv_heads, v_dim = keys.shape[1], v_quantizer.codec.dim
        rows = query_heads // kv_heads * steps
        packed = packed_of(keys).length
        masked = isinstance(call.mask, mx.array)
        dtype = keys.recent.dtype
        # Where no kernel rotates, everything is taken into the codes' basis before it.
        self._kernel_rotates_q = specialize.rotates_in_kernel(
            k_quantizer.codec.rotation
        )
        self._kernel_rotates_out = specialize.rotates_in_kernel(
            v_quantizer.codec.rotation
        )

        row_groups = specialize.row_groups(k_quantizer, v_quantizer, rows)
        team = specialize.split_simdgroups(v_quantizer)
        # A split's tokens: a whole tile for each simdgroup of its threadgroup.
        share = TILE * team
        means = k_quantizer.means
        split_tokens = tokens_per_split(
            packed,
            share,
            batch * kv_heads * row_groups,
            simdgroups // team,
            None if means is None else specialize.most_tokens(means.page, team),
        )
        splits = -(-packed // split_tokens)
        plain_splits = -(-(keys.sink_length + keys.recent.shape[2]) // share)
        arguments = AttendArguments(
            packed=packed,
            splits=splits,
            tokens_per_split=split_tokens,
            plain_splits=plain_splits,
            kv_heads=kv_heads,
            rows=rows,
            steps=steps,
            sink=keys.sink_length,
            recent=0,  # of each step: see `_rows_of`
            causal=int(isinstance(call.mask, str) and steps > 1),
            mask_columns=0,
            page=means.page if means else 1,
        )
        self._arguments, self._masked = arguments, masked
        self._rows: dict[int, list[mx.array]] = {}

        partials = batch * query_heads * steps * (plain_splits + splits)
        threads = 32 * team
        formats = [
            specialize.format_of(side.codec) for side in (k_quantizer, v_quantizer)
        ]
        by_fma = specialize.fma_rows(v_quantizer, rows, launcher.name, multiply_adds)
        self._split = Launch(
            split_kv_kernel(*(form.kind for form in formats), by_fma > 0),
            specialize.split_template(
                k_quantizer, v_quantizer, dtype, rows, masked, by_fma
            ),
            grid=(
                threads * (plain_splits + splits),
                kv_heads * row_groups,
                batch,
            ),
            threadgroup=(threads, 1, 1),
            # MLX would pass buffers of fewer than 8 elements to pass 2 as constants.
            output_shapes=[(partials, v_dim), (max(4, partials), 2)],
            output_dtypes=[mx.float32, mx.float32],
        )
        threads = 32 * MERGE_SIMDGROUPS
        self._merge = Launch(
            MERGE_STATES,
            specialize.merge_template(v_quantizer, dtype, call.sink_logits is not None),
            grid=(threads, batch * query_heads * steps, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, query_heads, steps, v_dim)],
            output_dtypes=[dtype],
        )
        empty = keys.recent.size == 0
        self._no_recent = specialize.stand_in(keys.recent) if empty else None
        if packed_of(keys).layout is None:
            raise ValueError("codes are in vector order; see Gpu.arranged")
        self._codes = [
            packed_of(side).arrays[name]
            for side in (keys, values)
            for name in ("words", "scales")
        ]
        rows_of_means = None if means is None else means.rows
        heads = batch * kv_heads
        self._split_constants = [
            placeholder(mx.float16) if rows_of_means is None else rows_of_means,
            *(form.params for form in formats),
            specialize.query_signs(k_quantizer.transform, heads),
            specialize.query_scales(k_quantizer, call.scale),
        ]
        self._v_signs = specialize.query_signs(v_quantizer.transform, heads)
        sink_keys = _sink_in_basis(keys, self._kernel_rotates_q)
        sink_values = _sink_in_basis(values, self._kernel_rotates_out)
        if sink_values is not None and sink_values.dtype != dtype:
            sink_values = sink_values.astype(dtype)
        self._sink_tokens = sink_keys, sink_values

    def arguments_at(self, recent: mx.array) -> mx.array:
        """The arguments of a call in a trace, where no number is known yet.

        Args:
            recent: Number (1,) of recent tokens, int32.

        Raises:
            ValueError: if there is a mask, whose columns would have to be known.
        """
        if self._masked:
            raise ValueError("a mask has as many columns as there are tokens")
        # Equal arguments of many layers are one computation: `mx.compile` sees to it.
        return pack(self._arguments) + recent * pack(_RECENT)

    def __call__(self, call: AttendCall, arguments: mx.array | None = None) -> mx.array:
        """The output (B, Hq, L, Dv) in q's dtype.

        Args:
            call: What to attend to.
            arguments: Of its number of recent tokens; None to look them up.
        """
        if arguments is None:
            block, row = divmod(call.keys.recent_length, _BLOCK)
            rows = self._rows.get(block)
            if rows is None:
                rows = _rows_of(self._arguments, self._masked, block)
                self._rows[block] = rows
            arguments = rows[row]
        q, keys, values = call.q, call.keys, call.values
        dtype = q.dtype
        recent_keys, recent_values = keys.recent, values.recent
        if not self._kernel_rotates_q:
            q = keys.quantizer.transform.encode_query(q)
            recent_keys = _recent_in_basis(keys)
        if not self._kernel_rotates_out:
            recent_values = _recent_in_basis(values)
        if self._no_recent is not None:
            recent_keys = recent_values = self._no_recent
        # The kernel reads both sides as the keys' dtype.
        if recent_values.dtype != recent_keys.dtype:
            recent_values = recent_values.astype(recent_keys.dtype)
        if q.dtype != keys.recent.dtype:
            q = q.astype(keys.recent.dtype)
        mask, sink_logits = placeholder(), placeholder()
        if isinstance(call.mask, mx.array):
            mask = _additive(call.mask, (*q.shape[:3], keys.stored_length))
        if call.sink_logits is not None:
            sink_logits = _sink_logits_of_rows(call.sink_logits, q.shape[0], q.shape[2])
        launch = self._launcher
        sink_keys, sink_values = self._sink_tokens
        partial = launch(
            self._split,
            [
                q,
                *self._codes,
                recent_keys if sink_keys is None else sink_keys,
                recent_values if sink_values is None else sink_values,
                recent_keys,
                recent_values,
                mask,
                *self._split_constants,
                arguments,
            ],
        )
        (out,) = launch(self._merge, [*partial, sink_logits, self._v_signs, arguments])
        if not self._kernel_rotates_out:
            out = values.quantizer.transform.decode(out)
        return out if out.dtype == dtype else out.astype(dtype)


@functools.lru_cache(maxsize=64)
def _rows_of(arguments: AttendArguments, masked: bool, block: int) -> list[mx.array]:
    """Packed arguments for each number of recent tokens of a block of `_BLOCK`.

    Layers whose other arguments are the same share them.
    """
    rows = []
    for recent in range(block * _BLOCK, (block + 1) * _BLOCK):
        columns = arguments.sink + arguments.packed + recent if masked else 0
        rows.append(arguments._replace(recent=recent, mask_columns=columns))
    return pack_rows(rows)


def _in_basis(side: CompressedTokens, x: mx.array) -> mx.array:
    """Uncompressed tokens (B, H, N, D) in the codes' basis, dtype kept."""
    return side.quantizer.transform.encode(x).astype(side.dtype)


def _recent_in_basis(side: CompressedTokens) -> mx.array:
    """Recent tokens likewise; of none the whole buffer, which nobody reads."""
    return _in_basis(side, side.recent_tokens) if side.recent_length else side.recent


def _sink_in_basis(side: CompressedTokens, rotates: bool) -> mx.array | None:
    """The sink as DECODE_SPLIT_KV takes it; contiguous, as caches keep it."""
    if side.sink is None or rotates:
        return side.sink
    return _in_basis(side, side.sink)


def _additive(mask: mx.array, shape: tuple[int, ...]) -> mx.array:
    """An array mask as additive float32 of ``shape``, log2 units."""
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -math.inf)
    return mx.contiguous(mx.broadcast_to(mask.astype(mx.float32), shape) * LOG2E)


def _sink_logits_of_rows(sink_logits: mx.array, batch: int, steps: int) -> mx.array:
    """Sink logits (Hq,) of each query row, log2 units, at least 8 of them."""
    wide = (sink_logits.astype(mx.float32) * LOG2E)[None, :, None]
    rows = mx.broadcast_to(wide, (batch, sink_logits.shape[0], steps))
    return mx.pad(rows.reshape(-1), (0, 8))

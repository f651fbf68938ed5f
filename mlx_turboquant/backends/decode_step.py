"""`DecodeStep`: the two launches of a layer's decode attention, prepared per page.

    DECODE_SPLIT_KV   attends to the tokens in splits, to sink and recent ones in the
                      model's basis: partial outputs and log-sum-exp states of each
    MERGE_STATES      takes those of packed tokens out of the codes' basis, adds learned
                      sink logits, and normalises

Between two pages only q, the buffers of recent tokens and where those end change, in
all rows of a batch alike. All else is in here: templates, grids, constant buffers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable

import mlx.core as mx

from ..kernels.arguments import pack, pack_bytes, pack_steps
from ..kernels.attention import MERGE_STATES, AttendArguments, split_kv_kernel
from ..kernels.kernel import Launch, Launcher
from ..kernels.tuning import UNTUNED, Tuning
from ..tokens import TILE
from ..transform import ChannelTransform
from . import specialize
from .call import AttendCall, BatchCall
from .geometry import tokens_per_split
from .specialize import LOG2E, placeholder
from .step_rows import (
    GROWTH,
    StepSide,
    arguments_of,
    rows_of,
    side_of,
    tables_of,
)

#: Ends of recent tokens whose arguments are made at once.
_BLOCK = 64
_Arguments = tuple[AttendArguments, ...]


def kind_of(call: AttendCall | BatchCall) -> tuple[Hashable, ...]:
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
        tuning: What is better there than on every machine.
    """

    def __init__(
        self,
        launcher: Launcher,
        call: AttendCall | BatchCall,
        simdgroups: int,
        tuning: Tuning = UNTUNED,
    ) -> None:
        self._launcher = launcher
        q, keys, dtype = call.q, call.keys, call.keys.dtype
        self._keys, self._values = side_of(keys), side_of(call.values)
        k_quantizer, v_quantizer = self._keys.quantizer, self._values.quantizer
        batch, query_heads, steps, _ = q.shape
        kv_heads, v_dim = keys.recent.shape[1], v_quantizer.codec.dim
        rows = query_heads // kv_heads * steps
        masked = isinstance(call.mask, mx.array)
        # Where no kernel rotates, everything is taken into the codes' basis before it.
        self._kernel_rotates_q = specialize.rotates_in_kernel(
            k_quantizer.codec.rotation
        )
        self._kernel_rotates_out = specialize.rotates_in_kernel(
            v_quantizer.codec.rotation
        )

        row_groups = specialize.row_groups(k_quantizer, v_quantizer, rows)
        team = specialize.split_simdgroups(v_quantizer, tuning)
        means = k_quantizer.means
        tokens = rows_of(keys)
        split_tokens = tokens_per_split(
            sum(row.packed for row in tokens),
            TILE * team,
            kv_heads * row_groups,
            simdgroups // team,
            None if means is None else specialize.most_tokens(means.page, team),
            tuning,
        )
        common = AttendArguments(
            **dict.fromkeys(AttendArguments._fields, 0)
            | {
                "tokens_per_split": split_tokens,
                "kv_heads": kv_heads,
                "rows": rows,
                "steps": steps,
                "causal": int(isinstance(call.mask, str) and steps > 1),
                "page": means.page if means else 1,
            }
        )
        tables, begins = tables_of(tokens)
        self._tiles = pack_bytes(tables)
        self._arguments = arguments_of(tokens, begins, common, TILE * team, keys)
        self._masked = masked
        self._steps: dict[int, list[mx.array]] = {}

        partials = sum(
            query_heads * steps * (own.plain_splits + own.splits)
            for own in self._arguments
        )
        splits = max(own.plain_splits + own.splits for own in self._arguments)
        threads = 32 * team
        formats = [
            specialize.format_of(side.codec) for side in (k_quantizer, v_quantizer)
        ]
        by_fma = specialize.fma_rows(v_quantizer, rows, launcher.name, tuning)
        self._split = Launch(
            split_kv_kernel(*(form.kind for form in formats), by_fma > 0),
            specialize.split_template(
                k_quantizer, v_quantizer, dtype, rows, masked, by_fma, tuning
            ),
            grid=(threads * splits, kv_heads * row_groups, batch),
            threadgroup=(threads, 1, 1),
            # MLX would pass buffers of fewer than 8 elements to pass 2 as constants.
            output_shapes=[(partials, v_dim), (max(4, partials), 2)],
            output_dtypes=[mx.float32, mx.float32],
        )
        threads = 32 * specialize.merge_simdgroups(tuning)
        self._merge = Launch(
            MERGE_STATES,
            specialize.merge_template(
                v_quantizer, dtype, call.sink_logits is not None, tuning
            ),
            grid=(threads, query_heads * steps, batch),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, query_heads, steps, v_dim)],
            output_dtypes=[dtype],
        )
        empty = keys.recent.size == 0
        self._no_recent = specialize.stand_in(keys.recent) if empty else None
        if any(
            side.packed is not None and side.packed.layout is None
            for side in (self._keys, self._values)
        ):
            raise ValueError("codes are in vector order; see Gpu.arranged")
        heads = batch * kv_heads
        self._split_constants = [
            *(form.params for form in formats),
            specialize.query_signs(k_quantizer.transform, heads),
            specialize.query_scales(k_quantizer, call.scale),
        ]
        self._v_signs = specialize.query_signs(v_quantizer.transform, heads)
        self._sink_tokens = [
            _sink_in_basis(self._keys, dtype, self._kernel_rotates_q),
            _sink_in_basis(self._values, dtype, self._kernel_rotates_out),
        ]

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
        growth = pack(*[GROWTH] * len(self._arguments))
        return pack(*self._arguments) + recent * growth

    def __call__(
        self, call: AttendCall | BatchCall, arguments: mx.array | None = None
    ) -> mx.array:
        """The output (B, Hq, L, Dv) in q's dtype.

        Args:
            call: What to attend to.
            arguments: Of where its recent tokens end; None to look them up.
        """
        q, keys, stop = call.q, call.keys, call.keys.stop
        if arguments is None:
            block, step = divmod(stop, _BLOCK)
            steps = self._steps.get(block)
            if steps is None:
                steps = self._steps[block] = _steps_of(self._arguments, block)
            arguments = steps[step]
        dtype = q.dtype
        recent_keys, recent_values = keys.recent, call.values.recent
        if not self._kernel_rotates_q:
            transform = self._keys.quantizer.transform
            q = transform.encode_query(q)
            recent_keys = _recent_in_basis(transform, recent_keys, stop)
        if not self._kernel_rotates_out:
            transform = self._values.quantizer.transform
            recent_values = _recent_in_basis(transform, recent_values, stop)
        if self._no_recent is not None:
            recent_keys = recent_values = self._no_recent
        # The kernel reads both sides as the keys' dtype.
        if recent_values.dtype != recent_keys.dtype:
            recent_values = recent_values.astype(recent_keys.dtype)
        if q.dtype != keys.recent.dtype:
            q = q.astype(keys.recent.dtype)
        mask, sink_logits = placeholder(), placeholder()
        if isinstance(call.mask, mx.array):
            first = self._arguments[0]
            columns = min(first.longest + stop, first.most_shown)
            mask = _additive(call.mask, (*q.shape[:3], columns))
        if call.sink_logits is not None:
            sink_logits = _sink_logits_of_rows(call.sink_logits, q.shape[0], q.shape[2])
        launch = self._launcher
        sink_keys, sink_values = self._sink_tokens
        partial = launch(
            self._split,
            [
                q,
                *_codes_of(self._keys),
                *_codes_of(self._values),
                recent_keys if sink_keys is None else sink_keys,
                recent_values if sink_values is None else sink_values,
                recent_keys,
                recent_values,
                mask,
                self._tiles,
                _means_of(self._keys),
                *self._split_constants,
                arguments,
            ],
        )
        (out,) = launch(self._merge, [*partial, sink_logits, self._v_signs, arguments])
        if not self._kernel_rotates_out:
            out = self._values.quantizer.transform.decode(out)
        return out if out.dtype == dtype else out.astype(dtype)


@functools.lru_cache(maxsize=64)
def _steps_of(arguments: _Arguments, block: int) -> list[mx.array]:
    """Packed arguments for each end of recent tokens of a block of `_BLOCK`.

    Layers whose other arguments are the same share them.
    """
    return pack_steps(arguments, GROWTH, block * _BLOCK, _BLOCK)


def _codes_of(side: StepSide) -> tuple[mx.array, mx.array]:
    """Words and scales, as they are now: a pool that grows has new buffers."""
    if side.packed is None:
        return placeholder(mx.uint32), placeholder(mx.float16)
    arrays = side.packed.arrays
    return arrays["words"], arrays["scales"]


def _means_of(side: StepSide) -> mx.array:
    """Means of pages, likewise."""
    means = side.quantizer.means
    rows = None if means is None else means.rows
    return placeholder(mx.float16) if rows is None else rows


def _recent_in_basis(
    transform: ChannelTransform, recent: mx.array, stop: int
) -> mx.array:
    """Recent tokens (B, H, stop, D) in the codes' basis, dtype kept.

    Of none the whole buffer, which nobody reads.
    """
    if not stop:
        return recent
    return transform.encode(recent[:, :, :stop]).astype(recent.dtype)


def _sink_in_basis(side: StepSide, dtype: mx.Dtype, rotates: bool) -> mx.array | None:
    """The sink as DECODE_SPLIT_KV takes it; contiguous, as caches keep it."""
    sink = side.sink
    if sink is not None and not rotates:
        sink = side.quantizer.transform.encode(sink)
    return sink if sink is None or sink.dtype == dtype else sink.astype(dtype)


def _additive(mask: mx.array, shape: tuple[int, ...]) -> mx.array:
    """An array mask as additive float32 of ``shape``, log2 units; a view of fewer."""
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -math.inf)
    else:
        mask = mask.astype(mx.float32) * LOG2E
    return mx.broadcast_to(mask, shape)


def _sink_logits_of_rows(sink_logits: mx.array, batch: int, steps: int) -> mx.array:
    """Sink logits (Hq,) of each query row, log2 units, at least 8 of them."""
    wide = (sink_logits.astype(mx.float32) * LOG2E)[None, :, None]
    rows = mx.broadcast_to(wide, (batch, sink_logits.shape[0], steps))
    return mx.pad(rows.reshape(-1), (0, 8))

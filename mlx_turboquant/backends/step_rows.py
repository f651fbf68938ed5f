"""The rows of a decode step brought together: a cache's own, or those of a batch.

Owns what two launches need of several sequences: arrays with a row of each, the table
of their tiles, their arguments. Launch sizes are `decode_step`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from ..batch_handles import CompressedBatch
from ..kernels.attention import AttendArguments
from ..quantizer import Quantizer
from ..segments import CompressedTokens
from ..tokens import Codes
from ..transform import ChannelTransform

#: Tokens that a step sees where no window hides any: more than there can be.
_ALL = (1 << 31) - 1

Handle = CompressedTokens | CompressedBatch


class StepSide(NamedTuple):
    """Keys or values of all rows, as far as no step changes them.

    Attributes:
        quantizer: Their codec and means, and a transform of B rows.
        packed: Codes of a row that has some; its buffers are those of all. None if no
            row has any.
        sink: First tokens (B, H, longest S, D), contiguous; None if no row has any.
    """

    quantizer: Quantizer
    packed: Codes | None
    sink: mx.array | None


class StepRow(NamedTuple):
    """The tokens of one row.

    Attributes:
        packed: How many are codes.
        sink: How many are before them.
        first_recent: Where those behind them begin in their buffer.
        pool_row: Which row of the buffers of codes is its.
        tiles: Where in that its tiles are, as int32: bytes are hashed once.
    """

    packed: int
    sink: int
    first_recent: int
    pool_row: int
    tiles: bytes


def side_of(handle: Handle) -> StepSide:
    """What a side's rows have that no step changes.

    Raises:
        ValueError: if rows of a batch have different codecs.
    """
    if isinstance(handle, CompressedTokens):
        return StepSide(handle.quantizer, handle.packed, handle.sink)
    side = handle.rows[0].quantizer.side
    lasting: StepSide | None = handle.lasting.get(side)
    if lasting is None:
        lasting = handle.lasting[side] = _joined_side(handle)
    packed = (row.packed for row in handle.rows)
    return lasting._replace(packed=next((p for p in packed if p is not None), None))


def _joined_side(handle: CompressedBatch) -> StepSide:
    """Transforms and sinks of the rows of a batch."""
    rows = handle.rows
    quantizers = [row.quantizer for row in rows]
    codec = quantizers[0].codec
    if any(quantizer.codec is not codec for quantizer in quantizers):
        specs = ", ".join(sorted({str(q.codec.spec) for q in quantizers}))
        raise ValueError(f"rows of {specs} cannot share a launch; group them by codec")
    heads = handle.recent.shape[1]
    quantizer = replace(quantizers[0], transform=_joined(quantizers, heads))
    return StepSide(quantizer, None, _padded_sinks([row.sink for row in rows]))


def rows_of(handle: Handle) -> tuple[StepRow, ...]:
    """The tokens of each row."""
    if isinstance(handle, CompressedTokens):
        tiles = b"" if handle.packed is None else handle.packed.tiles.tobytes()
        lengths = handle.packed_length, handle.sink_length
        return tuple(
            StepRow(*lengths, 0, row, tiles) for row in range(handle.recent.shape[0])
        )
    return tuple(
        StepRow(
            row.packed_length,
            row.sink_length,
            first,
            0,
            b"" if row.packed is None else row.packed.tiles.tobytes(),
        )
        for row, first in zip(handle.rows, handle.firsts, strict=True)
    )


def tables_of(
    rows: Sequence[StepRow],
) -> tuple[bytes, tuple[int, ...]]:
    """Distinct tables of tiles side by side, and where each row's begins, in tiles.

    Rows of one cache share theirs.
    """
    starts: dict[bytes, int] = {}
    length = 0
    for row in rows:
        if row.tiles not in starts:
            starts[row.tiles] = length
            length += len(row.tiles) // 4
    return b"".join(starts), tuple(starts[row.tiles] for row in rows)


def arguments_of(
    rows: Sequence[StepRow],
    tables: Sequence[int],
    common: AttendArguments,
    share: int,
    handle: Handle,
) -> tuple[AttendArguments, ...]:
    """Each row's arguments, as if recent tokens ended where their buffer begins.

    So `recent` and `longest` lack what a step's end says: see `GROWTH`.

    Args:
        rows: The rows.
        tables: Where the table of each begins.
        common: What is the same in all.
        share: Tokens that are not packed to a split.
        handle: What the rows are of.
    """
    longest = max(row.sink + row.packed - row.first_recent for row in rows)
    keep, most_shown, capacity = 0, _ALL, handle.recent.shape[2]
    if isinstance(handle, CompressedBatch) and handle.most_shown is not None:
        keep, most_shown = handle.keep, handle.most_shown
    arguments, partial = [], 0
    for row, table in zip(rows, tables, strict=True):
        own = common._replace(
            packed=row.packed,
            splits=-(-row.packed // common.tokens_per_split),
            plain_splits=-(-(row.sink + capacity - row.first_recent) // share),
            sink=row.sink,
            recent=-row.first_recent,
            first_recent=row.first_recent,
            longest=longest,
            keep=keep,
            most_shown=most_shown,
            pool_row=row.pool_row,
            table=table,
            first_partial=partial,
        )
        arguments.append(own)
        partial += own.kv_heads * own.rows * (own.splits + own.plain_splits)
    return tuple(arguments)


#: What arguments gain with each token that recent tokens end later.
GROWTH = AttendArguments(
    *(int(field in ("recent", "longest")) for field in AttendArguments._fields)
)


def _joined(quantizers: Sequence[Quantizer], kv_heads: int) -> ChannelTransform:
    """The transforms of rows as that of a batch; kernels' codecs order no channels."""
    transforms = [quantizer.transform for quantizer in quantizers]
    rotation, dim = transforms[0].rotation, quantizers[0].codec.dim
    if all(transform.gains is None for transform in transforms):
        return ChannelTransform(rotation)
    none = mx.ones((1, kv_heads, 1, dim))
    gains = [none if t.gains is None else t.gains for t in transforms]
    return ChannelTransform(rotation, mx.concatenate(gains))


def _padded_sinks(sinks: Sequence[mx.array | None]) -> mx.array | None:
    """Sinks (1, H, S, D) of rows as (B, H, longest S, D), zeros behind the shorter."""
    some = [sink for sink in sinks if sink is not None]
    if not some:
        return None
    _, heads, _, dim = some[0].shape
    longest = max(sink.shape[2] for sink in some)
    none = mx.zeros((1, heads, 0, dim), some[0].dtype)
    padded = []
    for sink in (none if sink is None else sink for sink in sinks):
        behind = longest - sink.shape[2]
        padded.append(mx.pad(sink, [(0, 0), (0, 0), (0, behind), (0, 0)]))
    return mx.contiguous(mx.concatenate(padded))

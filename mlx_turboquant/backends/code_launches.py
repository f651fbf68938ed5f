"""Launches of the kernels that make tile order and that decode it.

Owns their templates and sizes; what they do is defined in `tiles` and by the codecs.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..kernels.codes import DECODE_CODES, ORDER_CODES
from ..kernels.kernel import Launch
from ..tiles import TileLayout
from ..tokens import TILE

_THREADS = 128
#: Columns of a slot that a thread decodes.
_UNIT_COLUMNS = 4


@functools.lru_cache(maxsize=256)
def order_launch(layout: TileLayout, batch: int, kv_heads: int, tokens: int) -> Launch:
    """Of ORDER_CODES, for words and scales in vector order that lie together.

    Inputs: words uint32 (batch, kv_heads, tokens, vector_words), scales fp16 (batch,
    kv_heads, tokens, scales), and packed `OrderArguments` of ``tokens``. Outputs: as
    `TileLayout.to_tiles`.
    """
    tiles = -(-tokens // TILE)
    lead = (batch, kv_heads, tiles)
    return Launch(
        ORDER_CODES,
        _template(layout),
        grid=(_THREADS * batch * kv_heads * tiles, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(*lead, layout.tile_words), (*lead, layout.tile_scales)],
        output_dtypes=[mx.uint32, mx.float16],
    )


@functools.lru_cache(maxsize=256)
def decode_launch(
    layout: TileLayout, dtype: mx.Dtype, batch: int, kv_heads: int, tokens: int
) -> Launch:
    """Of DECODE_CODES, for the first ``tokens`` tokens of some heads.

    Inputs: words uint32 (batch, kv_heads, at least ceil(tokens / 32), tile_words) and
    scales fp16 (.., tile_scales), slices by batch and head or whole, the codec's
    ``exact_params``, and packed `DecodeArguments`. Output: vectors (batch, kv_heads,
    tokens, dim) of ``dtype``.
    """
    units = -(-layout.padded_dim // (8 * _UNIT_COLUMNS))
    threads = batch * kv_heads * -(-tokens // TILE) * TILE * units
    return Launch(
        DECODE_CODES,
        [("T", dtype), *_template(layout)],
        grid=(_THREADS * -(-threads // _THREADS), 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(batch, kv_heads, tokens, layout.dim)],
        output_dtypes=[dtype],
    )


def _template(layout: TileLayout) -> list[tuple[str, Any]]:
    return [
        ("DIM", layout.dim),
        ("KIND", layout.kind),
        ("BITS", layout.bits),
        ("TERMS", layout.terms),
        ("VALUES", layout.side == "values"),
        ("THREADS", _THREADS),
    ]

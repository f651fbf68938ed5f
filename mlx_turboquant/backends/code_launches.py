"""Launches of the kernels beside attention: encode, order, decode, rotate, sum up.

Owns their templates and sizes; what they do is defined in `tiles` and by the codecs.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..codecs.kernel_format import EncodeFormat
from ..kernels.codes import (
    CHANNEL_GAINS,
    ENCODE_SCALAR,
    ENCODE_TRELLIS,
    MATERIALIZE,
    ORDER_CODES,
    PAGE_MEANS,
    ROTATE,
    MaterializeArguments,
    PageMeansArguments,
    RotateArguments,
)
from ..kernels.kernel import Launch
from ..tiles import TileLayout
from ..tokens import TILE

_THREADS = 128
#: Elements that a simdgroup rotates at once, 16 of them to a lane.
_ROTATED_ELEMENTS = 512
#: Simdgroups that sum up a page together, at most, and their floats of threadgroup
#: memory: 16 kB.
_SUMMING_SIMDGROUPS, _SUMMING_FLOATS = 16, 4096
#: Columns of a slot that a thread decodes.
_UNIT_COLUMNS = 4
#: Simdgroups of an encoder's threadgroup, at most.
_ENCODE_SIMDGROUPS = 4
#: Vectors that a simdgroup searches for: their ways back go side by side.
_SEARCHES = 2
#: Threadgroup memory that one threadgroup's searches may take, in bytes.
_SEARCH_BYTES = 24 << 10


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
def materialize_launch(
    layout: TileLayout,
    dtypes: tuple[mx.Dtype, mx.Dtype],
    arguments: MaterializeArguments,
    rotates: bool,
    centers: bool,
) -> Launch:
    """Of MATERIALIZE, for some heads of a side.

    Inputs: words uint32 (B, all heads, at least ceil(packed / 32), tile_words) and
    scales fp16 (.., tile_scales); packed `TokenArrays.tiles`; the codec's
    ``exact_params``; means fp16 (B, all heads, pages, dim) if it ``centers``; sink and
    recent (B, all heads, tokens, dim), in the model's basis if it ``rotates``, else in
    the codes'; `specialize.key_signs`; packed ``arguments``. Output: vectors (B,
    heads, tokens, dim).

    Args:
        layout: Of the codes.
        dtypes: Of sink and recent tokens, and of the output.
        arguments: What the kernel is told.
        rotates: Whether the kernel takes sink and recent tokens into the codes' basis.
        centers: Whether it adds means.
    """
    sink, packed, recent, heads, _, _, batch, _ = arguments
    units = -(-layout.padded_dim // (8 * _UNIT_COLUMNS))
    plain = 32 * batch * heads * (sink + recent)
    unit_threads = batch * heads * -(-packed // TILE) * TILE * units
    groups = -(-plain // _THREADS) + -(-unit_threads // _THREADS)
    return Launch(
        MATERIALIZE,
        [
            ("TX", dtypes[0]),
            ("T", dtypes[1]),
            *_template(layout),
            ("ROTATE", rotates),
            ("CENTER", centers),
        ],
        grid=(_THREADS * groups, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(batch, heads, sink + packed + recent, layout.dim)],
        output_dtypes=[dtypes[1]],
    )


@functools.lru_cache(maxsize=256)
def rotate_launch(
    dim: int, dtype: mx.Dtype, arguments: RotateArguments, inverse: bool
) -> Launch:
    """Of ROTATE, for queries, or if ``inverse`` outputs.

    Inputs: x (B, heads, tokens, dim) of ``dtype``, however it lies;
    `specialize.query_signs`; packed ``arguments``. Output: of the same shape, but (B,
    tokens, heads, dim) if inverse.
    """
    tokens, heads, _, batch = arguments
    simdgroups = _THREADS // 32
    run = max(1, _ROTATED_ELEMENTS // dim)
    groups = -(-(batch * heads * -(-tokens // run)) // simdgroups)
    lead = (batch, tokens, heads) if inverse else (batch, heads, tokens)
    return Launch(
        ROTATE,
        [
            ("T", dtype),
            ("DIM", dim),
            ("TOKENS", run),
            ("INVERSE", inverse),
            ("SIMDGROUPS", simdgroups),
        ],
        grid=(_THREADS * groups, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(*lead, dim)],
        output_dtypes=[dtype],
    )


@functools.lru_cache(maxsize=256)
def page_means_launch(
    dim: int, dtype: mx.Dtype, arguments: PageMeansArguments
) -> Launch:
    """Of PAGE_MEANS.

    Inputs: x (B, H, pages * page, dim) of ``dtype``, however it lies;
    `specialize.key_signs`; packed ``arguments``. Output: means fp16 (B, H, pages, dim),
    in the codes' basis.
    """
    pages, _, kv_heads, batch = arguments
    simdgroups = _summing_simdgroups(dim)
    threads = 32 * simdgroups
    return Launch(
        PAGE_MEANS,
        [("T", dtype), ("DIM", dim), ("SIMDGROUPS", simdgroups)],
        grid=(threads * batch * kv_heads * pages, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(batch, kv_heads, pages, dim)],
        output_dtypes=[mx.float16],
    )


@functools.lru_cache(maxsize=256)
def gains_launch(
    shape: tuple[int, int, int, int],
    dtypes: tuple[mx.Dtype, mx.Dtype],
    centers: bool,
    has_queries: bool,
) -> Launch:
    """Of CHANNEL_GAINS.

    Inputs: x of ``shape`` (B, H, tokens, dim) and queries (B, H * group, tokens, dim)
    of ``dtypes``, however they lie, and packed `GainsArguments`. Output: gains float32
    (B, H, 1, dim).
    """
    batch, kv_heads, _, dim = shape
    simdgroups = _summing_simdgroups(dim)
    threads = 32 * simdgroups
    return Launch(
        CHANNEL_GAINS,
        [
            ("T", dtypes[0]),
            ("Q", dtypes[1]),
            ("DIM", dim),
            ("CENTER", centers),
            ("HAS_QUERIES", has_queries),
            ("SIMDGROUPS", simdgroups),
        ],
        grid=(threads * batch * kv_heads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(batch, kv_heads, 1, dim)],
        output_dtypes=[mx.float32],
    )


def _summing_simdgroups(dim: int) -> int:
    return min(_SUMMING_SIMDGROUPS, _SUMMING_FLOATS // dim)


def _template(layout: TileLayout) -> list[tuple[str, Any]]:
    return [
        ("DIM", layout.dim),
        ("KIND", layout.kind),
        ("BITS", layout.bits),
        ("TERMS", layout.terms),
        ("VALUES", layout.side == "values"),
        ("THREADS", _THREADS),
    ]


@functools.lru_cache(maxsize=256)
def encode_launch(
    form: EncodeFormat,
    dtype: mx.Dtype,
    shape: tuple[int, int, int, int],
    rotates: bool,
    centers: bool,
) -> Launch:
    """Of vectors (B, H, T, D) of ``dtype`` to codes in vector order."""
    batch, kv_heads, tokens, dim = shape
    vectors = batch * kv_heads * tokens
    if form.kernel == "scalar":
        kernel, simdgroups, searches = ENCODE_SCALAR, _ENCODE_SIMDGROUPS, 1
        own: dict[str, Any] = {}
    else:
        kernel = ENCODE_TRELLIS
        simdgroups, searches = _searches_of(form.template["COUNT"])
        own = {"VECTORS": searches}
    groups = -(-vectors // (simdgroups * searches))
    template = {
        "T": dtype,
        "DIM": dim,
        **form.template,
        **own,
        "ROTATE": rotates,
        "CENTER": centers,
        "SIMDGROUPS": simdgroups,
    }
    return Launch(
        kernel,
        list(template.items()),
        grid=(32 * simdgroups * groups, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(batch, kv_heads, tokens, form.words), (*shape[:3], 1)],
        output_dtypes=[mx.uint32, mx.float16],
    )


def _searches_of(count: int) -> tuple[int, int]:
    """Simdgroups to a threadgroup, and vectors to a simdgroup, of a trellis search.

    A search holds its steps and half a byte a branch, 20 bytes for each of ``count``
    elements, and a simdgroup two buffers of 128 costs.
    """
    vectors = max(1, min(_SEARCHES, _SEARCH_BYTES // (20 * count)))
    simdgroups = _SEARCH_BYTES // (20 * count * vectors + 1024)
    return max(1, min(_ENCODE_SIMDGROUPS, simdgroups)), vectors

"""Sequences whose codes lie in one pool, as backends get them; for tests of batches."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
from helpers import in_tile_order

import mlx_turboquant as tq
from mlx_turboquant.batch_handles import CompressedBatch
from mlx_turboquant.quantizer import PageMeans
from mlx_turboquant.segments import PreparedSteps
from mlx_turboquant.tokens import TILE, TokenArrays

HEADS, SPARE_PAGES = 2, 3
#: Tokens of each sequence: none of the first's are packed.
LENGTHS = (23, 97, 321, 700)


class Pooled(TokenArrays):
    """Codes whose tiles lie anywhere in buffers of a pool."""

    __slots__ = ("places",)

    @property
    def tiles(self):
        return np.array(self.places, np.int32)

    def view(self, name, heads=slice(None)):
        return self.arrays[name][:, heads][:, :, mx.array(self.places)]


def sequences(spec, dims, dtype=mx.float32, lengths=LENGTHS):
    """Handles of caches on their own; all channels differ in size and mean."""
    rows = []
    for length in lengths:
        k, v = (
            mx.exp(mx.random.normal((1, HEADS, 1, dim)))
            * mx.random.normal((1, HEADS, length, dim))
            + mx.random.normal((1, HEADS, 1, dim))
            for dim in dims
        )
        cache = tq.TurboQuantCache(spec)
        for part in (slice(0, -16), slice(-16, length)):
            cache.update_and_fetch(
                k[:, :, part].astype(dtype), v[:, :, part].astype(dtype)
            )
        rows.append([in_tile_order(side) for side in cache.compressed()])
    return rows


def pooled(rows):
    """Keys and values of the same rows as a `CompressedBatch` each.

    Pages lie in no order; what no row has is no number.
    """
    page = next((k.quantizer.means.page for k, _ in rows if k.quantizer.means), TILE)
    counts = [-(-k.packed_length // page) for k, _ in rows]
    order = np.random.default_rng(7).permutation(sum(counts) + SPARE_PAGES)
    pages = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    batches, prepared = [], PreparedSteps()
    for sides in zip(*rows, strict=True):
        codes = pool_of([s.packed for s in sides], pages, page // TILE, len(order))
        quantizers = [side.quantizer for side in sides]
        if quantizers[0].means is not None:
            means = mean_pool([q.means for q in quantizers], pages, len(order))
            quantizers = [replace(q, means=means) for q in quantizers]
        recent, firsts, stop = common_buffer(sides)
        own = [
            replace(
                side,
                quantizer=quantizer,
                packed=packed,
                recent=recent[row : row + 1, :, first:stop],
                recent_length=stop - first,
            )
            for row, (side, quantizer, packed, first) in enumerate(
                zip(sides, quantizers, codes, firsts, strict=True)
            )
        ]
        batches.append(CompressedBatch(own, recent, firsts, stop, None, prepared))
    return batches


def pool_of(packed, pages, page_tiles, count):
    """Each row's codes, in one pool of ``count`` pages."""
    some = next(codes for codes in packed if codes is not None)
    arrays = {}
    for name, array in some.arrays.items():
        shape = (1, HEADS, count * page_tiles, array.shape[3])
        rubbish = math.nan if name == "scales" else 0xFFFFFFFF
        arrays[name] = np.full(shape, rubbish, np.array(array).dtype)
    places = []
    for codes, own in zip(packed, pages, strict=True):
        tiles = (own[:, None] * page_tiles + np.arange(page_tiles)).reshape(-1)
        if codes is not None:
            tiles = tiles[: -(-codes.length // TILE)]
            for name, array in codes.views().items():
                arrays[name][:, :, tiles] = np.array(array)
        places.append(tuple(tiles.tolist()))
    arrays = {name: mx.array(array) for name, array in arrays.items()}
    rows = []
    for codes, tiles in zip(packed, places, strict=True):
        if codes is None:
            rows.append(None)
            continue
        row = Pooled(arrays, codes.length, layout=codes.layout)
        row.places = tiles
        rows.append(row)
    return rows


def mean_pool(means, pages, count):
    dim = next(m.rows for m in means if m.count).shape[3]
    rows = np.full((1, HEADS, count, dim), math.nan, np.float16)
    for own, numbers in zip(means, pages, strict=True):
        if own.count:
            rows[:, :, numbers] = np.array(own.state["keys"])[:, :, : len(numbers)]
    pool = PageMeans(means[0].page)
    pool.append(mx.array(rows))
    return pool


def common_buffer(sides, spare=5):
    """Recent tokens that end together in one buffer, of no numbers elsewhere."""
    stop = max(side.recent_length for side in sides) + 2
    _, heads, _, dim = sides[0].recent.shape
    parts = []
    for side in sides:
        ends = [stop - side.recent_length, spare]
        around = [mx.full((1, heads, n, dim), math.nan, side.dtype) for n in ends]
        parts.append(mx.concatenate([around[0], side.recent_tokens, around[1]], axis=2))
    return mx.concatenate(parts), [stop - side.recent_length for side in sides], stop


def grow(rows):
    """Pools of other, longer buffers; in the old ones is no number any more."""
    packed = [row.packed for row in rows]
    old = packed[0].arrays
    tails = {
        n: mx.zeros((*a.shape[:2], 4, a.shape[3]), a.dtype) for n, a in old.items()
    }
    new = {n: mx.concatenate([a, tails[n]], axis=2) for n, a in old.items()}
    mx.eval(new)
    old["scales"][:] = math.nan
    for codes in packed:
        codes.arrays = new
    means = rows[0].quantizer.means
    if means is not None:
        before = means.rows
        means.append(mx.zeros((1, HEADS, 20, before.shape[3])))
        mx.eval(means.rows)
        before[:] = math.nan

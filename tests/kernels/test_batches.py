"""Batches of sequences of unlike lengths in one launch, over codes in a pool of pages.

The definition is the reference, row by row, over each sequence's own buffers.
"""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import in_tile_order, relative_error

import mlx_turboquant as tq
from mlx_turboquant.backends import decode_step
from mlx_turboquant.backends.call import AttendCall, BatchCall
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.quantizer import PageMeans
from mlx_turboquant.segments import CompressedBatch, PreparedSteps
from mlx_turboquant.tokens import TILE, TokenArrays

TOLERANCE = 4e-3
HEADS, SPARE_PAGES = 2, 3
#: Tokens of each sequence: none of the first's are packed.
LENGTHS = (23, 97, 321, 700)


class Pooled(TokenArrays):
    """Codes whose tiles lie anywhere in buffers of a pool."""

    __slots__ = ("places",)

    @property
    def tiles(self):
        return self.places


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


def pooled(rows, poison=True):
    """Keys and values of the same rows as a `CompressedBatch` each.

    Pages lie in no order; what no row has is no number.
    """
    page = next((k.quantizer.means.page for k, _ in rows if k.quantizer.means), TILE)
    counts = [-(-k.packed_length // page) for k, _ in rows]
    order = np.random.default_rng(7).permutation(sum(counts) + SPARE_PAGES)
    pages = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    batches, prepared = [], PreparedSteps()
    for sides in zip(*rows, strict=True):
        codes = [pool_of([s.packed for s in sides], pages, page // TILE, len(order))]
        codes = codes[0]
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


def masks_of(kind, batch, heads, steps, lengths):
    """A mask for all rows, right-aligned, and each row's own."""
    longest = max(lengths)
    if kind == "bool":
        mask = mx.random.uniform(shape=(batch, 1, steps, longest)) > 0.3
    elif kind == "additive":
        mask = mx.random.normal((batch, heads, steps, longest))
    else:
        return kind, [kind] * batch
    return mask, [mask[row : row + 1, ..., -n:] for row, n in enumerate(lengths)]


#: spec, dims, group, L, mask, learned sinks, dtype
CASES = {
    "one token": ("k3v3", (64, 64), 2, 1, None, False, mx.float32),
    "llama": ("k3v3", (128, 128), 4, 1, None, False, mx.bfloat16),
    "causal": ("k4v2", (128, 64), 2, 4, "causal", False, mx.float16),
    "verify rows": ("k3v3", (64, 64), 2, 16, "causal", True, mx.float32),
    "tree": ("k4v4", (64, 64), 2, 16, "bool", False, mx.float32),
    "additive": ("k3v4,center=off", (64, 64), 1, 2, "additive", True, mx.float32),
    "not rotated": ("k4v4", (80, 96), 2, 2, "causal", False, mx.float32),
    "no sink": ("k4v4,sink=0,equalize=off", (64, 64), 2, 1, None, False, mx.float32),
    "trellis": ("k3v2.5,codec=trellis", (64, 64), 2, 1, "bool", False, mx.float32),
    "angles": (
        "k3.5v3,codec=research.turboangle",
        (64, 64),
        1,
        1,
        None,
        False,
        mx.float32,
    ),
    "wide": ("k8v8", (256, 256), 1, 1, None, False, mx.float32),
}


def prepared(case, lengths=LENGTHS):
    spec, dims, group, steps, kind, learned, dtype = CASES[case]
    rows = sequences(f"{spec},page=64,window=17", dims, dtype, lengths)
    heads, batch = HEADS * group, len(rows)
    q = mx.random.normal((batch, heads, steps, dims[0])).astype(dtype)
    shown = [k.shape[2] for k, _ in rows]
    mask, own = masks_of(kind, batch, heads, steps, shown)
    sinks = mx.random.normal((heads,)) if learned else None
    return rows, q, dims[0] ** -0.5, mask, own, sinks


def alone(rows, q, scale, masks, sinks):
    """The reference, row by row."""
    outputs = []
    for row, ((keys, values), mask) in enumerate(zip(rows, masks, strict=True)):
        sides = [replace(side, backend=Reference()) for side in (keys, values)]
        own = q[row : row + 1].astype(mx.float32)
        outputs.append(tq.attend(own, *sides, scale, mask, sinks))
    return mx.concatenate(outputs)


def attended(backend, rows, q, scale, mask, sinks):
    sides = [replace(side, backend=backend) for side in pooled(rows)]
    out = tq.attend(q, *sides, scale, mask, sinks)
    assert len(sides[0].prepared) == 1
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_batch_agrees_with_the_reference_row_by_row(case, launcher):
    rows, q, scale, mask, masks, sinks = prepared(case)
    got = attended(Gpu(launcher, 24), rows, q, scale, mask, sinks)
    assert got.dtype == q.dtype
    want = alone(rows, q, scale, masks, sinks)
    floor = 0.004 if q.dtype == mx.bfloat16 else 0
    for row in range(len(rows)):
        error = relative_error(
            got[row].astype(mx.float32), want[row].astype(mx.float32)
        )
        assert error < TOLERANCE + floor, row


@pytest.mark.parametrize("case", ["one token", "additive"])
def test_batches_in_every_mode(case, launcher, mode):
    rows, q, scale, mask, masks, sinks = prepared(case, (130, 23, 270))
    got = attended(Gpu(launcher, 12), rows, q, scale, mask, sinks)
    assert relative_error(got, alone(rows, q, scale, masks, sinks)) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["one token", "llama", "verify rows", "tree", "trellis"]
)
def test_a_row_is_its_single_launch_bit_for_bit(case, launcher, monkeypatch):
    """In splits of the same size; codes and recent tokens lie elsewhere."""
    monkeypatch.setattr(decode_step, "tokens_per_split", lambda *sizes: 128)
    rows, q, scale, mask, masks, sinks = prepared(case)
    backend, batch = Gpu(launcher), pooled(rows)
    got = backend.attend_batch(BatchCall(q, *batch, scale, mask, sinks))
    for row, (sides, own) in enumerate(zip(rows, masks, strict=True)):
        if row == 0:  # without codes it is MLX's own attention
            continue
        first = batch[0].firsts[row]
        sides = [
            replace(
                side,
                recent=mx.contiguous(joined.recent[row : row + 1, :, first:]),
                prepared=PreparedSteps(),
            )
            for side, joined in zip(sides, batch, strict=True)
        ]
        call = AttendCall(q[row : row + 1], *sides, scale, own, sinks)
        assert mx.array_equal(got[row : row + 1], backend.attend(call)).item(), row

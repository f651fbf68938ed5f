"""Caches whose codes are in tile order against ones whose codes are not.

What keeps tile order here is `helpers.InTiles`, which attends by definition; kernels
take its place in ``tests/kernels/test_caches.py``.
"""

import copy
import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers import InTiles, attend, backend, relative_error, stored
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from test_cache import DV, AgainstAList, feed, same_state, settle, tokens
from test_sliding import PLANS, WINDOW, run
from test_sliding import drawn as drawn_for_windows

import mlx_turboquant as tq
from mlx_turboquant.tiles import in_vectors

TILES = InTiles()
#: Codecs of every kind that kernels read.
SPECS = (
    "k3v3,page=64,window=20",
    "k5v5,page=32,window=9,center=off",
    "k1v7,page=64,sink=0,window=0",
    "k3v2.5,page=32,window=9,codec=trellis",
    "k3.5v3,page=32,window=9,codec=research.turboangle",
    "k2.5v4,page=32,codec=research.turboangle-fixed/rotated-int4",
)
each_spec = pytest.mark.parametrize("spec", SPECS)
#: A page of several tiles, and attention as exact as 4 bits.
TRIMMED = "k4v4,page=96,window=20"


def of_both(make):
    """What ``make`` returns with codes in vector order, and with them in tile order."""
    made = []
    for chosen in (None, TILES):
        with backend(chosen):
            made.append(make())
    return made


def grown(spec, count=300):
    return settle(
        feed(tq.TurboQuantCache(spec), tokens(count), tokens(count, DV), [count])
    )


def same_tokens(tiles, vectors):
    """Both hold the same tokens, bit for bit, each in its own order."""
    assert len(tiles.state) == len(vectors.state)
    for name, array in tiles.state.items():
        if not name.startswith(("header", "packed:")):
            assert mx.array_equal(array, vectors.state[name]).item(), name
    sides = zip(tiles.compressed(), vectors.compressed(), strict=True)
    for side, (tile_side, vector_side) in zip(("keys", "values"), sides, strict=True):
        a, b = tile_side.packed, vector_side.packed
        assert a.layout == tile_side.quantizer.layout
        assert a.layout.side == side
        assert b.layout is None
        assert a.length == b.length > 0
        for name, array in in_vectors(a).arrays.items():
            assert mx.array_equal(array, b.view(name)).item(), name


def outputs(caches, n=1, seed=7):
    """What each gives the same queries when it has stored the same ``n`` tokens."""
    q = tokens(2 * n, seed=seed).reshape(1, 4, n, -1)
    new = tokens(n, seed=seed + 1), tokens(n, DV, seed=seed + 2)
    mask = "causal" if n > 1 else None
    return [attend(q, *cache.update_and_fetch(*new), 0.125, mask) for cache in caches]


@each_spec
def test_the_same_codes_in_another_order(spec):
    vectors, tiles = of_both(lambda: grown(spec))
    same_tokens(tiles, vectors)
    a, b = outputs((tiles, vectors))
    assert relative_error(a, b) < 1e-5


@each_spec
def test_a_state_loads_in_either_order(spec):
    """Whichever it was saved in; what is loaded goes on as what was saved."""
    vectors, tiles = of_both(lambda: grown(spec, 140))
    assert " tiles=0" in vectors.state["header"]
    assert " tiles=1" in tiles.state["header"]
    same_state(tq.TurboQuantCache.from_state(vectors.state), vectors)
    with backend(None):
        loaded = tq.TurboQuantCache.from_state(tiles.state)
    same_state(loaded, vectors)
    with backend(TILES):
        again = tq.TurboQuantCache.from_state(loaded.state)
        same_state(tq.TurboQuantCache.from_state(tiles.state), tiles)
    same_state(again, tiles)
    for cache in (loaded, again, tiles):
        feed(cache, tokens(70, seed=5), tokens(70, DV, seed=6), [1, 69])
        settle(cache)
    same_state(again, tiles)
    same_tokens(again, loaded)
    a, b = outputs((again, loaded), n=3)
    assert relative_error(a, b) < 1e-5


def test_a_state_without_codes_loads_under_either():
    for first, second in ((None, TILES), (TILES, None)):
        cache = feed(tq.TurboQuantCache("k3v3"), tokens(50), tokens(50, DV), [50])
        with backend(first):
            state = cache.state
            assert " tiles=0" in state["header"]
        with backend(second):
            same_state(tq.TurboQuantCache.from_state(state), cache)


@pytest.mark.parametrize("sink", [0, 4])
@pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, 63, 64, 100, 127, 129, 191])
def test_a_trim_of_codes_costs_at_most_their_own_error(kept, sink):
    """Until its page is full again a cut tile's tokens are what their codes said.

    Then they are encoded a second time, so their error is at most twice that of once;
    that of others is as it was, to a fifth, since a page may get another mean.
    """
    keys, values = tokens(340), tokens(340, DV, seed=1)

    def trimmed():
        cache = grown(f"{TRIMMED},sink={sink}")
        cache.trim(300 - sink - kept)
        assert cache.offset == sink + kept
        return cache

    def attended(cache, part):
        q = mx.repeat(keys[:, :, part], 2, axis=1)
        sides = cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        return attend(q, *sides, 0.125, "causal" if q.shape[2] > 1 else None)

    vectors, tiles = of_both(trimmed)
    at = sink + kept
    assert tiles.packed_length == kept // 32 * 32
    assert tiles.sink_length + tiles.packed_length + tiles.recent_length == at
    for part in (slice(at, at + 1), slice(at + 1, at + 4)):
        a, b = (attended(cache, part) for cache in (tiles, vectors))
        assert relative_error(a, b) < 1e-5
    part = slice(at + 4, 340)
    a, b = (attended(cache, part) for cache in (tiles, vectors))
    for cache in (tiles, vectors):
        settle(cache)
    assert tiles.packed_length == vectors.packed_length
    cut = slice(sink + kept // 32 * 32, at)
    assert relative_error(a, b) < 0.3
    for side, whole in zip((0, 1), (keys, values), strict=True):
        got, once = (stored(cache.compressed()[side]) for cache in (tiles, vectors))
        for tokens_of, bound in (
            (cut, 2.0),
            (slice(0, cut.start), 1.2),
            (slice(at, 340), 1.2),
        ):
            want = whole[:, :, tokens_of]
            if want.shape[2]:
                error = relative_error(got[:, :, tokens_of], want)
                assert error <= bound * relative_error(once[:, :, tokens_of], want)


#: Packed tokens kept, tokens behind them and before them.
@pytest.mark.parametrize(
    ("kept", "behind", "sink"),
    [
        *itertools.product((10, 32, 110), (0, 5), (0, 4)),
        *((0, 5, 0), (0, 5, 4), (0, 0, 4)),
    ],
)
@pytest.mark.parametrize("orders", [(None, TILES), (TILES, None)], ids=["to", "from"])
def test_a_trimmed_state_loads_in_the_other_order(orders, kept, behind, sink):
    """With tokens behind the cut, or none; it goes on as what was saved."""
    keys, values = tokens(340), tokens(340, DV, seed=1)
    at = sink + kept + behind
    with backend(orders[0]):
        saved = grown(f"{TRIMMED},sink={sink}")
        saved.trim(300 - sink - kept)
        if behind:
            part = slice(at - behind, at)
            saved.update_and_fetch(keys[:, :, part], values[:, :, part])
        state = saved.state
    with backend(orders[1]):
        loaded = tq.TurboQuantCache.from_state(state)
    assert loaded.offset == at
    if orders[1]:
        assert loaded.packed_length == kept // 32 * 32
    for got, want in zip(loaded.compressed(), saved.compressed(), strict=True):
        assert relative_error(stored(got), stored(want)) < 1e-6
    for part in (slice(at, at + 1), slice(at + 1, 339), slice(339, 340)):
        q = mx.repeat(keys[:, :, part], 2, axis=1)
        a, b = (
            attend(
                q, *cache.update_and_fetch(keys[:, :, part], values[:, :, part]), 0.1
            )
            for cache in (loaded, saved)
        )
        assert relative_error(a, b) < (1e-5 if part.start == at else 0.3)
    assert settle(loaded).packed_length == settle(saved).packed_length


def test_a_trim_goes_on_into_the_sink():
    """What a cut first tile leaves behind can be trimmed in its turn."""
    vectors, tiles = of_both(lambda: grown(TRIMMED))
    for cache in (vectors, tiles):
        cache.trim(300 - 4 - 10)
        cache.trim(12)
        assert cache.offset == 2
    a, b = outputs((tiles, vectors), n=3)
    assert relative_error(a, b) < 1e-6


def test_a_trim_leaves_earlier_handles_as_they_were():
    _, tiles = of_both(lambda: grown(TRIMMED))
    handles = tiles.compressed()
    before = [np.array(stored(side)) for side in handles]
    tiles.trim(70)
    for side, want in zip(handles, before, strict=True):
        assert side.packed_length == 256
        assert np.array_equal(np.array(stored(side)), want)


def test_copies_are_independent():
    vectors, tiles = of_both(lambda: grown("k3v3"))
    twin = copy.deepcopy(tiles)
    same_state(twin, tiles)
    feed(twin, tokens(200, seed=5), tokens(200, DV, seed=5), [1, 60])
    twin.trim(120)
    same_tokens(tiles, vectors)
    twin = copy.deepcopy(tiles)
    for cache in (twin, vectors):
        feed(cache, tokens(200, seed=5), tokens(200, DV, seed=5), [1, 60])
        settle(cache)
    same_tokens(twin, vectors)


@pytest.mark.parametrize("plan", PLANS, ids=["steps", "mixed", "long"])
@pytest.mark.parametrize("keep", [0, 4])
def test_windows_forget_whole_tiles(plan, keep):
    tensors = drawn_for_windows(plan)

    def window():
        cache = tq.RotatingTurboQuantCache("4,window=4,sink=2,page=32", WINDOW, keep)
        return cache, run(cache, plan, tensors)

    (vectors, a), (tiles, b) = of_both(window)
    assert relative_error(a, b) < 1e-5
    assert tiles.packed_length == vectors.packed_length
    assert tiles._evicted_pages == vectors._evicted_pages > 0
    same_tokens(tiles, vectors)
    again, there = of_both(lambda: type(tiles).from_state(tiles.state))
    same_tokens(there, again)
    assert there.packed_length == tiles.packed_length


def test_batches_are_rows_in_tile_order():
    lengths = (300, 20, 160)

    def made():
        rows = [grown("k4v4,page=32", n) for n in lengths]
        batch = tq.BatchTurboQuantCache.merge(rows)
        q, k, v = (
            mx.random.normal((3, h, 3, d), key=mx.random.key(h * d))
            for h, d in ((4, 64), (2, 64), (2, DV))
        )
        before = [dict(row.state) for row in rows]
        out = attend(q, *batch.update_and_fetch(k, v), 0.125, batch.make_mask(3))
        for row, state in zip(rows, before, strict=True):
            for name, array in row.state.items():
                if name != "header":
                    assert mx.array_equal(array, state[name]).item()
        alone = []
        for i, row in enumerate(rows):
            sides = row.update_and_fetch(k[i : i + 1], v[i : i + 1])
            alone.append(attend(q[i : i + 1], *sides, 0.125, "causal"))
            same_state(batch.extract(i), row)
        assert relative_error(out, mx.concatenate(alone)) < 1e-6
        batch.filter([2, 0])
        batch.extend(tq.BatchTurboQuantCache.merge([rows[1]]))
        return batch, out

    (vectors, a), (tiles, b) = of_both(made)
    assert relative_error(a, b) < 1e-5
    assert tiles.offset.tolist() == vectors.offset.tolist() == [163, 303, 23]
    for i in (0, 1):
        same_tokens(tiles.extract(i), vectors.extract(i))
    for batch in (tiles, vectors):
        assert batch.trim(40) == 40
    for i in (0, 1):
        taken, row = tiles.extract(i), vectors.extract(i)
        assert taken.packed_length == row.packed_length // 32 * 32
        a, b = outputs((taken, row))
        assert relative_error(a, b) < 1e-5


class TilesAgainstAList(AgainstAList):
    """The same in tile order, where trims encode a token again and again."""

    bound = 0.05

    def __init__(self):
        self.on_machine(TILES)
        super().__init__()

    def on_machine(self, chosen):
        self.machine = backend(chosen)
        self.machine.__enter__()

    @rule(chosen=st.sampled_from([None, TILES]))
    def save_and_load(self, chosen):
        """Maybe on a machine that keeps codes in the other order."""
        self.teardown()
        self.on_machine(chosen)
        super().save_and_load()

    def teardown(self):
        self.machine.__exit__(None, None, None)


TestTilesAgainstAList = TilesAgainstAList.TestCase
TestTilesAgainstAList.settings = settings(max_examples=25)

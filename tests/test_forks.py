"""Forks: of batches, in other threads, of caches whose bits are still to be chosen."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from helpers import Joining, backend
from test_joined import SPEC, feed, grown, text

import mlx_turboquant as tq
from mlx_turboquant.cache import BatchTurboQuantCache, BitAllocator, LayerSlot
from mlx_turboquant.pages import PagePool
from mlx_turboquant.pool_shelf import PoolShelf


@pytest.fixture(autouse=True, params=["rows alone", "rows joined"])
def ways(request, monkeypatch):
    monkeypatch.setattr(PagePool, "poisons", True)
    with backend(Joining() if request.param == "rows joined" else None):
        yield


def on_a_shelf(shelf):
    def make():
        cache = tq.TurboQuantCache(SPEC)
        cache.share_pages(shelf)
        return cache

    return make


def holders(cache):
    table = cache._tokens.table
    return table.pool.holders(table.pages).tolist()


def test_copies_of_handles_and_batches_hold_their_pages():
    """A copy that is gone must not take the pages of others with it."""
    make = on_a_shelf(PoolShelf())
    batch = BatchTurboQuantCache.merge([grown(1, 300, make), grown(2, 200, make)])
    feed(batch, *text(1, 5, 2))
    twin = batch.fork()
    copies = copy.deepcopy([batch, batch.keys_and_values()])
    del copies
    gc.collect()
    grown(3, 400, make)
    new = text(1, 6, 2)
    assert mx.array_equal(feed(batch, *new), feed(twin, *new))
    assert set(holders(batch.extract(0))) == {3}  # the batch's, the twin's, its own


def test_a_batch_forks():
    batch = BatchTurboQuantCache.merge([grown(1, 130), grown(2, 75)])
    feed(batch, *text(1, 5, 2))
    fork = batch.fork()
    alone = fork.nbytes
    assert alone == batch.nbytes
    for step in range(40):
        feed(fork, *text(1, 10 + step, 2))
    assert batch.offset.tolist() == [131, 76]
    assert fork.offset.tolist() == [171, 116]
    new = text(1, 60, 2)
    again = BatchTurboQuantCache.merge([grown(1, 130), grown(2, 75)])
    feed(again, *text(1, 5, 2))
    assert mx.array_equal(feed(batch, *new), feed(again, *new))


def test_a_row_that_is_kept_twice_is_two_rows():
    batch = BatchTurboQuantCache.merge([grown(1, 100), grown(2, 60)])
    feed(batch, *text(1, 3, 2))
    batch.filter([0, 0, 1])
    new = text(1, 4, 3)
    got = feed(batch, *new)
    assert batch.offset.tolist() == [102, 102, 62]
    want = grown(1, 100)
    feed(want, *(x[:1] for x in text(1, 3, 2)))
    for row in range(2):
        twin = want.fork()
        alone = feed(twin, *(x[row : row + 1] for x in new))
        assert mx.allclose(got[row], alone[0], atol=1e-5)


def test_extending_leaves_the_other_batch_alone():
    batch = BatchTurboQuantCache.merge([grown(1, 100)])
    other = BatchTurboQuantCache.merge([grown(2, 50)])
    batch.extend(other)
    feed(batch, *text(1, 4, 2))
    assert (batch.offset.tolist(), other.offset.tolist()) == ([101, 51], [50])
    other.extend(other)
    feed(other, *text(1, 5, 2))
    assert other.offset.tolist() == [51, 51]
    other.filter([])
    assert other.keys is None
    assert other.nbytes == 0


def test_a_page_of_several_rows_counts_once():
    cache = grown(1, 500)
    batch = BatchTurboQuantCache.merge([cache] * 4)
    pages = cache._tokens.table
    rest = cache.nbytes - pages.nbytes
    free = pages.pool.capacity - pages.pool.held
    want = 4 * rest + pages.nbytes + free * pages.pool.page_nbytes
    assert batch.nbytes == want < 2.5 * cache.nbytes


def test_a_fork_goes_on_in_another_thread():
    """While the original goes on here, and packs pages of the pool they shared."""
    first = grown(1, 300)
    fork = first.fork()
    mx.eval(fork.state)
    texts = [text(1, 100 + step) for step in range(100)]
    mx.eval(texts)
    want = [feed(first.fork(), *texts[0])]

    def steps(cache):
        return [feed(cache, *new) for new in texts]

    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(steps, fork)
        here = steps(first)
        for a, b in zip(there.result(), here, strict=True):
            assert mx.array_equal(a, b)
    assert mx.array_equal(here[0], want[0])
    assert set(holders(first) + holders(fork)) == {1}


def test_a_fork_without_pages_leaves_the_pool_to_its_thread():
    first = grown(1, 300)
    fork = first.fork()
    fork.trim(295)
    mx.eval(fork.state)
    pool, new = first._tokens.table.pool, text(1, 5)
    mx.eval(new)
    here = pool.thread
    with ThreadPoolExecutor(1) as there:
        there.submit(feed, fork, *new).result()
    assert pool.thread == here
    assert fork._tokens.table.pool is not pool
    feed(first, *new)


def test_forks_choose_bits_of_their_own():
    """Each by its own text, all layers of a fork together."""
    spec = tq.CacheSpec.parse("auto,budget=4,page=32,window=5,sink=2")

    def conversation():
        allocator = BitAllocator(spec, [None, None])
        return [tq.TurboQuantCache(spec, LayerSlot(allocator, i)) for i in range(2)]

    def read(caches, gain):
        for layer, cache in enumerate(caches):
            q, k, v = text(90, 7 + layer)
            feed(cache, q * (gain if layer else 1.0), k, v, "causal")
        for layer, cache in enumerate(caches):
            feed(cache, *text(1, 9 + layer))
        return [str(cache.spec) for cache in caches]

    first = conversation()
    forks = [cache.fork() for cache in first]
    again = copy.deepcopy(first)
    much, little = read(conversation(), 8.0), read(conversation(), 0.1)
    assert much != little
    assert read(forks, 8.0) == much
    assert read(first, 0.1) == little
    assert read(again, 8.0) == much


def test_a_pool_gives_back_what_is_free_in_its_middle():
    make = on_a_shelf(PoolShelf())
    long, some = grown(1, 6000, make), [grown(i, 100, make) for i in (2, 3)]
    pool = long._tokens.table.pool
    assert pool.capacity > 180
    twins = [grown(i, 100) for i in (2, 3)]
    del long
    gc.collect()
    for step in range(40):
        new = text(1, 10 + step)
        for cache, twin in zip(some, twins, strict=True):
            assert mx.array_equal(feed(cache, *new), feed(twin, *new))
    assert all(cache._tokens.table.pool is pool for cache in some)
    assert pool.capacity < 64


def test_a_shallow_copy_is_a_fork():
    cache = grown(1, 200)
    copied = copy.copy(cache)
    assert copied.trim(50) == 50
    new = text(1, 5)
    assert mx.array_equal(feed(cache, *new), feed(grown(1, 200), *new))

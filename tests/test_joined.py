"""Batches whose steps are taken together, and caches that hold the same pages."""

import copy
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from helpers import Joining, attend, backend
from test_batch import tiny_model

import mlx_turboquant as tq
from mlx_turboquant.pages import PagePool
from mlx_turboquant.pool_shelf import PoolShelf

SPEC = "k4v4,page=32,window=5,sink=2"
LENGTHS = (130, 75, 260)


@pytest.fixture(autouse=True)
def joining(monkeypatch):
    monkeypatch.setattr(PagePool, "poisons", True)
    with backend(Joining()):
        yield


def text(count, seed, batch=1):
    """Queries, keys and values; four heads on two."""
    keys = mx.random.split(mx.random.key(seed), 3)
    return [
        mx.random.normal((batch, heads, count, 64), key=key)
        for heads, key in zip((4, 2, 2), keys, strict=True)
    ]


def feed(cache, q, k, v, mask=None):
    out = attend(q, *cache.update_and_fetch(k, v), 0.125, mask)
    mx.eval(out, cache.state)
    return out


def grown(seed, count, make=lambda: tq.TurboQuantCache(SPEC)):
    cache = make()
    feed(cache, *text(count, seed), cache.make_mask(count))
    return cache


def steps_of(batch, count, seed, sizes=(1,)):
    """Outputs of some steps of a batch, and what its rows would have got alone."""
    got, inputs = [], []
    for step in range(count):
        size = sizes[step % len(sizes)]
        inputs.append(text(size, 1000 * seed + step, batch.offset.size))
        got.append(feed(batch, *inputs[-1], batch.make_mask(size)))
    return got, inputs


def alone(caches, inputs):
    return [
        mx.concatenate(
            [
                feed(
                    cache,
                    *(x[i : i + 1] for x in step),
                    cache.make_mask(step[0].shape[2]),
                )
                for i, cache in enumerate(caches)
            ]
        )
        for step in inputs
    ]


def same(got, want):
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert mx.array_equal(a, b).item()


def same_caches(one, other):
    assert one.offset == other.offset
    for name, array in one.state.items():
        if name == "header":
            assert array == other.state[name]
        else:
            assert mx.array_equal(array, other.state[name]).item(), name


def windows():
    return tq.RotatingTurboQuantCache(SPEC, 100, keep=2)


@pytest.mark.parametrize("make", [None, windows], ids=["all", "window"])
def test_rows_are_what_they_are_alone(make):
    """Through 150 steps: pages of three rows at different times, full buffers."""
    more = {} if make is None else {"make": make}
    singles = [grown(i, n, **more) for i, n in enumerate(LENGTHS)]
    batch = type(singles[0]).merge(singles)
    got, inputs = steps_of(batch, 150, 1, (1, 1, 4, 1, 16))
    assert batch._joined is not None
    same(got, alone(singles, inputs))
    assert batch._joined is not None
    for row, single in zip(batch.rows, singles, strict=True):
        same_caches(row, single)


def test_rows_share_a_pool_and_give_it_back():
    singles = [grown(i, n) for i, n in enumerate(LENGTHS)]
    batch = tq.BatchTurboQuantCache.merge(singles)
    steps_of(batch, 2, 1)
    pools = {row._tokens.table.pool for row in batch._rows}
    assert len(pools) == 1
    (pool,) = pools
    pages = [len(row._tokens.table.pages) for row in batch._rows]
    # The longest was there; its original still holds its pages, too.
    assert pool.held == sum(pages)
    assert pool is singles[2]._tokens.table.pool
    batch.filter([0])
    assert pool.held == pages[0] + pages[2]  # the single's
    del singles
    assert pool.held == pages[0]


def test_members_come_and_go():
    singles = [grown(i, n) for i, n in enumerate((*LENGTHS, 90))]
    batch = tq.BatchTurboQuantCache.merge(singles[:3])
    got, inputs = steps_of(batch, 5, 1)
    same(got, alone(singles[:3], inputs))
    batch.filter([2, 0])
    got, inputs = steps_of(batch, 40, 2)
    same(got, alone([singles[2], singles[0]], inputs))
    batch.extend(tq.BatchTurboQuantCache.merge(singles[3:]))
    members = [singles[2], singles[0], singles[3]]
    got, inputs = steps_of(batch, 40, 3)
    same(got, alone(members, inputs))
    assert batch.trim(4) == 4
    for single in members:
        single.trim(4)
    got, inputs = steps_of(batch, 3, 4)
    same(got, alone(members, inputs))
    same_caches(batch.extract(1), singles[0])
    assert batch.trim(60) == 60  # into codes
    for single in members:
        single.trim(60)
    got, inputs = steps_of(batch, 3, 5)
    same(got, alone(members, inputs))


@pytest.mark.parametrize(
    "other",
    [
        lambda: tq.TurboQuantCache("k4v3,page=32,window=5,sink=2"),
        lambda: tq.TurboQuantCache("k4v4,page=64,window=5,sink=2"),
        windows,
    ],
    ids=["bits", "page", "window"],
)
def test_rows_that_differ_are_groups(other):
    """Two of one kind, two of another, by turns, and one without a page yet."""
    singles = [grown(0, 130), grown(1, 150, other), grown(2, 90), grown(3, 230, other)]
    singles.append(grown(4, 8))
    batch = tq.BatchTurboQuantCache.merge(singles)
    got, inputs = steps_of(batch, 12, 1, (1, 1, 4))
    same(got, alone(singles, inputs))
    groups = batch._joined
    assert [rows for rows, _ in groups._joined] == [[0, 2], [1, 3]]
    assert groups._alone == [4]
    batch.filter([4, 3, 0])
    got, inputs = steps_of(batch, 30, 2)
    members = [singles[i] for i in (4, 3, 0)]
    same(got, alone(members, inputs))
    assert batch._joined._alone == []  # it has a page by now
    assert [rows for rows, _ in batch._joined._joined] == [[0, 2], [1]]
    for row, single in zip(batch.rows, members, strict=True):
        same_caches(row, single)


def test_groups_take_masks_and_say_what_they_stand_for():
    singles = [grown(0, 130), grown(1, 150, windows), grown(2, 90)]
    batch = tq.BatchTurboQuantCache.merge(singles)
    q, k, v = text(3, 1, 3)
    longest = max(cache.shown_before() for cache in singles) + 3
    mask = mx.random.uniform(shape=(3, 1, 3, longest)) < 0.7
    sides = batch.update_and_fetch(k, v)
    assert sides[0].shape == (3, 2, longest, 64)
    assert sides[0].dtype == mx.float32
    assert sides[0].observer is None
    got = attend(q, *sides, 0.125, mask)
    for i, cache in enumerate(singles):
        own = slice(i, i + 1)
        handles = cache.update_and_fetch(k[own], v[own])
        want = attend(q[own], *handles, 0.125, mask[own, :, :, -handles[0].shape[2] :])
        assert mx.array_equal(got[own], want).item()


def test_rows_that_hand_out_arrays_go_alone():
    batch = tq.BatchTurboQuantCache(
        [tq.TurboQuantCache(SPEC, returns_arrays=True) for _ in range(2)]
    )
    for count in (130, 1):
        keys, _ = batch.update_and_fetch(*text(count, count, 2)[1:])
    assert keys.shape == (2, 2, 131, 64)
    assert batch._joined is None


def test_forks_go_their_own_way():
    cache = grown(0, 300)
    fork = cache.fork()
    pages = len(cache._tokens.table.pages)
    assert cache.shared_nbytes == fork.shared_nbytes == pages * page_bytes(cache)
    same_caches(cache, fork)
    twin = grown(0, 300)
    for seed in (1, 2):
        for who, own in ((cache, 1), (fork, 2)):
            out = feed(who, *text(40, 10 * own + seed), "causal")
            if who is cache:
                want = feed(twin, *text(40, 10 * own + seed), "causal")
                assert mx.array_equal(out, want).item()
    same_caches(cache, twin)
    assert fork.offset == 380
    assert cache._tokens.table.shared_pages == pages
    assert not mx.array_equal(cache.keys, fork.keys).item()


def test_explain_says_what_is_shared():
    cache = grown(0, 300)
    assert "shared" not in str(tq.explain(cache))
    forks = [cache.fork(), cache.fork()]
    shared = tq.explain(forks).shared_nbytes
    assert shared == 2 * cache.shared_nbytes > 0
    assert f"{shared / 1000:.1f} kB shared" in tq.explain(forks).summary()


def test_a_fork_that_is_trimmed_leaves_its_twin_alone():
    cache, twin = (
        grown(0, 300, lambda: tq.TurboQuantCache("k4v4,page=96,window=5"))
        for _ in range(2)
    )
    fork = copy.deepcopy(cache)
    fork.trim(60)  # into a page that both hold
    feed(fork, *text(150, 7), "causal")
    same_caches(cache, twin)
    fork.trim(1000)
    assert fork.empty()
    same_caches(cache, twin)
    assert cache.shared_nbytes == 0


def test_caches_of_one_layer_share_pages_through_merge_and_extract():
    shelf = PoolShelf()

    def make():
        cache = tq.TurboQuantCache(SPEC)
        cache.share_pages(shelf)
        return cache

    singles = [grown(i, n, make) for i, n in enumerate(LENGTHS)]
    pool = singles[0]._tokens.table.pool
    pages = sum(len(single._tokens.table.pages) for single in singles)
    assert pool.held == pages
    batch = tq.BatchTurboQuantCache.merge(singles)
    steps_of(batch, 1, 1)
    taken = batch.extract(1)
    assert pool.held == pages  # nobody copied a page
    assert taken.shared_nbytes == singles[1].shared_nbytes > 0
    assert sum(c._tokens.table.shared_pages for c in singles) == pages


def page_bytes(cache):
    return cache._tokens.table.pool.page_nbytes


def test_a_prompt_cache_forks_with_its_records(tiny):
    cache = tq.make_prompt_cache(tiny, SPEC)
    tokens = mx.arange(200)[None] % 50
    mx.eval(tiny(tokens, cache=cache), [c.state for c in cache])
    fork = cache.fork()
    assert (type(fork), fork.entries) == (type(cache), cache.entries)
    shared = tq.explain(fork).shared_nbytes
    assert shared == sum(c.shared_nbytes for c in cache) > 0
    one, other = (
        tiny(mx.array([[token]]), cache=c) for c, token in ((cache, 7), (fork, 9))
    )
    assert not mx.array_equal(one, other).item()
    assert [c.offset for c in cache] == [c.offset for c in fork] == [201, 201]


@pytest.fixture
def tiny():
    return tiny_model()


def test_a_row_without_a_page_stays_with_the_others():
    """It packs its first page among them, whose pool is not its shelf's."""
    long, short = grown(0, 300), grown(1, 50)
    for cache in (long, short):
        cache.share_pages(PoolShelf())
    short.trim(25)
    singles = [long.fork(), short.fork()]
    batch = tq.BatchTurboQuantCache.merge([long, short])
    got, inputs = steps_of(batch, 30, 1)
    same(got, alone(singles, inputs))
    assert batch._rows[1].packed_length > 0
    assert len({row._tokens.table.pool for row in batch._rows}) == 1


def test_windows_that_let_go_of_a_pool_stay_together():
    singles = [grown(0, 180, windows), grown(1, 50, windows)]
    singles[1].trim(25)
    batch = tq.BatchTurboQuantCache([cache.fork() for cache in singles])
    got, inputs = steps_of(batch, 60, 1)
    same(got, alone(singles, inputs))
    assert len({row._tokens.table.pool for row in batch._rows}) == 1


def test_forks_share_pages_after_they_moved():
    cache = grown(0, 300)
    pages = len(cache._tokens.table.pages)
    rows = [cache.fork() for _ in range(3)] + [grown(1, 600)]
    batch = tq.BatchTurboQuantCache(rows)
    steps_of(batch, 1, 1)
    pool = batch._rows[0]._tokens.table.pool
    assert pool.held == pages + len(batch._rows[3]._tokens.table.pages)
    assert all(row._tokens.table.shared_pages == pages for row in batch._rows[:3])


def test_sizes_may_be_read_on_other_threads(monkeypatch):
    """What is made of arrays there belongs to that thread: nothing is made there."""
    monkeypatch.setattr(PagePool, "poisons", False)  # which writes wherever it is
    shelf = PoolShelf()
    kept, gone = tq.TurboQuantCache(SPEC), tq.TurboQuantCache(SPEC)
    for cache, count in ((kept, 200), (gone, 3000)):
        cache.share_pages(shelf)
        feed(cache, *text(count, count), "causal")
    del cache, gone
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: kept.nbytes).result() == kept.nbytes
    feed(kept, *text(60, 5), "causal")
    assert kept._tokens.table.pool.capacity < 64


def test_threads_have_pools_of_their_own():
    shelf = PoolShelf()

    def run(seed):
        cache = tq.TurboQuantCache(SPEC)
        cache.share_pages(shelf)
        with mx.stream(mx.new_thread_local_stream(mx.cpu)):
            return mx.sum(feed(cache, *text(500, seed), "causal")).item()

    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(run, range(6)))) == 6

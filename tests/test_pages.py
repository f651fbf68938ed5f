"""Pages: places of a pool, who holds them, and what sequences read from them."""

from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlx_turboquant.page_table import PageTable
from mlx_turboquant.pages import PagePool, runs_of
from mlx_turboquant.tiles import TileLayout, in_tiles, in_vectors
from mlx_turboquant.tokens import TokenArrays

PAGE = 32
LAYOUT = TileLayout(0, 3, 6, 64, "keys")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What nobody holds is NaN and all bits: whoever reads it shows."""
    monkeypatch.setattr(PagePool, "poisons", True)


def codes_of(tokens, seed=0, batch=1):
    """Codes in vector order of some tokens, all different."""
    key = mx.random.key(seed)
    shape = (batch, 2, tokens, LAYOUT.vector_words)
    words = mx.random.randint(0, 1 << 30, shape, mx.uint32, key=key)
    scales = mx.random.normal((batch, 2, tokens, 1), key=key).astype(mx.float16)
    return TokenArrays({"words": words, "scales": scales})


def both(codes):
    return {"keys": codes, "values": codes}


def same(table, codes):
    for side in ("keys", "values"):
        held = table.codes(side)
        assert held.length == codes.length
        for name, array in in_vectors(held).arrays.items():
            want = in_vectors(codes).arrays[name]
            assert mx.array_equal(array, want).item(), (side, name)


def test_sequences_are_alone_in_their_pages():
    pool = PagePool(PAGE)
    first, second = PageTable(pool), PageTable(pool)
    a, b, c = (codes_of(tokens, seed) for seed, tokens in enumerate((96, 64, 40)))
    first.extend(both(a))
    second.extend(both(b))
    first.extend(both(c))
    assert (first.pages, second.pages) == ([0, 1, 2, 5, 6], [3, 4])
    whole = {n: mx.concatenate([x, c.arrays[n]], 2) for n, x in a.arrays.items()}
    same(first, TokenArrays(whole))
    same(second, b)
    assert pool.held == 7
    assert first.nbytes + second.nbytes == 7 * pool.page_nbytes
    assert pool.nbytes == pool.capacity * pool.page_nbytes
    del first
    assert pool.held == 2
    same(second, b)
    assert second.nbytes == pool.nbytes  # alone now, with the free ones


def test_a_fork_shares_until_it_writes():
    pool = PagePool(PAGE)
    table, codes = PageTable(pool), codes_of(80)
    table.append_means(mx.ones((1, 2, 3, 4)))
    table.extend(both(codes))
    fork = table.fork()
    assert fork.pages == table.pages
    assert fork.shared_nbytes == fork.nbytes == 3 * pool.page_nbytes
    more = codes_of(16, 1)
    fork.extend(both(more))  # into the page that is not full
    assert fork.pages[:2] == table.pages[:2]
    assert fork.pages[2] != table.pages[2]
    assert fork.shared_pages == 2
    assert pool.held == 4
    whole = {n: mx.concatenate([x, more.arrays[n]], 2) for n, x in codes.arrays.items()}
    same(fork, TokenArrays(whole))
    same(table, codes)
    assert mx.all(fork.mean_rows(0, 3) == 1).item()
    del table
    same(fork, TokenArrays(whole))
    assert pool.held == 3


def test_places_are_used_again_and_the_end_is_given_back():
    pool = PagePool(PAGE)
    tables = [PageTable(pool) for _ in range(40)]
    for seed in range(40):
        tables[seed].extend(both(codes_of(96, seed)))
    capacity = pool.capacity
    assert capacity >= 120
    del tables[10:20]
    again = PageTable(pool)
    again.extend(both(codes_of(30 * PAGE, 99)))
    assert pool.capacity == capacity
    assert again.pages == list(range(30, 60))
    same(again, codes_of(30 * PAGE, 99))
    del tables[1:]
    again.drop_last(30 * PAGE)
    assert pool.held == 3
    assert pool.capacity <= 32
    same(tables[0], codes_of(96, 0))


@pytest.mark.parametrize("tiles", [False, True])
def test_tokens_are_dropped_from_both_ends(tiles):
    codes = codes_of(160, batch=2)
    table = PageTable(PagePool(PAGE))
    table.extend(both(in_tiles(codes, LAYOUT) if tiles else codes))
    table.drop_last(60)
    assert len(table.pages) == 4
    table.drop(range(64 // PAGE))
    left = {name: array[:, :, 64:100] for name, array in codes.arrays.items()}
    same(table, TokenArrays(left))
    table.drop_last(4)
    more = codes_of(32, 2, batch=2)
    table.extend(both(in_tiles(more, LAYOUT) if tiles else more))
    left = {
        name: mx.concatenate([array[:, :, 64:96], more.arrays[name]], 2)
        for name, array in codes.arrays.items()
    }
    same(table, TokenArrays(left))


def test_another_order_and_what_follows_a_cut_tile_are_refused():
    vectors = codes_of(64)
    tiles = in_tiles(vectors, LAYOUT)
    of_values = in_tiles(vectors, replace(LAYOUT, side="values"))
    says = "codes of one order follow whole tiles"
    for held, new in ((vectors, tiles), (tiles, vectors), (tiles, of_values)):
        table = PageTable(PagePool(PAGE))
        table.extend(both(held))
        with pytest.raises(ValueError, match=says):
            table.extend(both(new))
        same(table, held)
    table = PageTable(PagePool(PAGE))
    table.extend(both(tiles))
    table.drop_last(1)
    with pytest.raises(ValueError, match=says):
        table.extend(both(tiles))
    assert table.length == 63


def test_a_sequence_moves_to_another_pool():
    table, codes = PageTable(PagePool(PAGE)), codes_of(96)
    table.append_means(mx.arange(24.0).reshape(1, 2, 3, 4))
    table.extend(both(codes))
    old, pool = table.pool, PagePool(PAGE)
    other = PageTable(pool)
    other.extend(both(codes_of(32, 5)))
    table.move_to(pool)
    assert (old.held, pool.held, table.pages) == (0, 4, [1, 2, 3])
    same(table, codes)
    want = mx.arange(24.0).reshape(1, 2, 3, 4)
    assert mx.array_equal(table.mean_rows(0, 3), want).item()


def test_runs():
    assert list(runs_of([])) == []
    assert list(runs_of([3])) == [(3, 4)]
    assert list(runs_of([5, 6, 2, 4, 5])) == [(5, 7), (2, 3), (4, 6)]


def numbered(first, count):
    """Codes of one word each: numbers from ``first`` on."""
    numbers = mx.arange(first, first + count, dtype=mx.uint32)
    return TokenArrays({"words": numbers.reshape(1, 1, count, 1)})


class Sequences(RuleBasedStateMachine):
    """Sequences of one pool, each against a list of what it holds."""

    def __init__(self):
        super().__init__()
        PagePool.poisons = True
        self.pool, self.written = PagePool(PAGE), 0
        self.tables = [(PageTable(self.pool), [])]

    def teardown(self):
        PagePool.poisons = False

    def of(self, which):
        return self.tables[which % len(self.tables)]

    @rule(which=st.integers(0, 9), tokens=st.integers(1, 80))
    def extend(self, which, tokens):
        table, held = self.of(which)
        table.extend(both(numbered(self.written, tokens)))
        held += range(self.written, self.written + tokens)
        self.written += tokens

    @precondition(lambda self: len(self.tables) < 6)
    @rule(which=st.integers(0, 9))
    def fork(self, which):
        table, held = self.of(which)
        self.tables.append((table.fork(), list(held)))

    @precondition(lambda self: len(self.tables) < 6)
    @rule()
    def begin(self):
        self.tables.append((PageTable(self.pool), []))

    @precondition(lambda self: len(self.tables) > 1)
    @rule(which=st.integers(0, 9))
    def forget(self, which):
        del self.tables[which % len(self.tables)]

    @rule(which=st.integers(0, 9), part=st.floats(0, 1))
    def drop_last(self, which, part):
        table, held = self.of(which)
        count = int(part * table.length)
        table.drop_last(count)
        del held[len(held) - count :]

    @rule(which=st.integers(0, 9), parts=st.sets(st.floats(0, 0.999), max_size=4))
    def drop(self, which, parts):
        table, held = self.of(which)
        places = {int(part * (table.length // PAGE)) for part in parts}
        places &= set(range(table.length // PAGE))
        table.drop(places)
        for place in sorted(places, reverse=True):
            del held[place * PAGE : (place + 1) * PAGE]

    @invariant()
    def holds_what_was_written(self):
        for table, held in self.tables:
            assert (table.length, len(table.pages)) == (
                len(held),
                -(-len(held) // PAGE),
            )
            for side in ("keys", "values"):
                if held:
                    words = table.codes(side).view("words")
                    assert words.reshape(-1).tolist() == held

    @invariant()
    def counts_are_right(self):
        for pool in {table.pool for table, _ in self.tables}:
            pages = [p for t, _ in self.tables if t.pool is pool for p in t.pages]
            assert pool.held == len(set(pages))
            for page in set(pages):
                assert pool.holders([page]).tolist() == [pages.count(page)]


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=40, stateful_step_count=20)

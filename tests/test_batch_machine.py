"""Batches under any order of what servers do to them, against plain lists of tokens."""

import mlx.core as mx
import numpy as np
import pytest
from helpers import InTiles, Joining, backend
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import mlx_turboquant as tq
from mlx_turboquant.attention import dequantize
from mlx_turboquant.pages import PagePool
from mlx_turboquant.pool_shelf import PoolShelf

VOCAB, HEADS, DIM = 40, 2, 32
SPEC = "8,window=3,sink=2,page=32"
WINDOW = 72
#: One vector for each token, head and side: storing tokens is storing these.
TABLE = np.random.default_rng(5).normal(size=(2, HEADS, VOCAB, DIM)).astype(np.float32)

lengths = st.integers(0, 70)
seeds = st.integers(0, 10**6)


def vectors(rows):
    """Keys and values (B, H, N, D) of rows of N tokens."""
    return (mx.array(side[:, np.array(rows)].swapaxes(0, 1)) for side in TABLE)


class Machine(RuleBasedStateMachine):
    """`TurboQuantCache` rows, or windows of them."""

    windowed = False

    shelf = PoolShelf()

    def single(self, tokens):
        cache = tq.TurboQuantCache(SPEC)
        if self.windowed:
            cache = tq.RotatingTurboQuantCache(SPEC, WINDOW)
        cache.share_pages(self.shelf)
        if tokens:
            cache.update_and_fetch(*vectors([tokens]))
        return cache

    @initialize(counts=st.lists(lengths, min_size=1, max_size=3), seed=seeds)
    def start(self, counts, seed):
        self.draw = np.random.default_rng(seed)
        self.texts = [self.tokens(count) for count in counts]
        self.batch = type(self.single([])).merge([self.single(t) for t in self.texts])
        self.before = [0] * len(counts)  # tokens before each row's last step

    def tokens(self, count):
        return self.draw.integers(0, VOCAB, count).tolist()

    def grown(self, row, new):
        if new:
            self.before[row] = len(self.texts[row])
            self.texts[row] = self.texts[row] + new

    @rule(count=st.integers(1, 30))
    def step(self, count):
        new = [self.tokens(count) for _ in self.texts]
        self.batch.update_and_fetch(*vectors(new))
        for row, tokens in enumerate(new):
            self.grown(row, tokens)

    @rule(steps=st.lists(st.integers(1, 16), min_size=2, max_size=12))
    def decode(self, steps):
        """Short steps, which rows that can take them together do."""
        for count in steps:
            self.step(count)

    @rule(data=st.data())
    def fork_a_row(self, data):
        """Another row goes on from where one is, on the same pages."""
        row = data.draw(st.integers(0, len(self.texts) - 1))
        taken = self.batch.extract(row)
        self.batch.extend(type(taken).merge([taken]))
        self.texts.append(list(self.texts[row]))
        self.before.append(self.before[row])
        if len(self.texts) > 5:
            self.keep([1, 2, 3, 4, 5])

    @rule(data=st.data())
    def padded_prompt(self, data):
        """Right padding, in two chunks, as mlx-lm reads prompts."""
        counts = [data.draw(lengths) for _ in self.texts]
        longest = max(*counts, 2)
        new = [self.tokens(count) for count in counts]
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in new]
        self.batch.prepare(
            lengths=counts, right_padding=[longest - count for count in counts]
        )
        cut = data.draw(st.integers(1, longest - 1))
        for part in (slice(0, cut), slice(cut, None)):
            chunk = [tokens[part] for tokens in padded]
            self.batch.update_and_fetch(*vectors(chunk))
            for row, tokens in enumerate(new):
                self.grown(row, tokens[part])
        self.batch.finalize()

    @rule(data=st.data())
    def left_padded_prompt(self, data):
        counts = [data.draw(st.integers(1, 20)) for _ in self.texts]
        longest = max(counts)
        new = [self.tokens(count) for count in counts]
        padded = [[0] * (longest - len(tokens)) + tokens for tokens in new]
        pads = [longest - count for count in counts]
        offsets = self.batch.offset
        self.batch.prepare(left_padding=pads)
        assert self.batch.offset.tolist() == (offsets - mx.array(pads)).tolist()
        self.batch.update_and_fetch(*vectors(padded))
        self.batch.finalize()
        for row, tokens in enumerate(new):
            self.grown(row, tokens)

    @rule(data=st.data())
    def keep_some(self, data):
        rows = st.lists(st.integers(0, len(self.texts) - 1), min_size=1, unique=True)
        self.keep(data.draw(rows))

    def keep(self, keep):
        self.batch.filter(mx.array(keep))
        self.texts = [self.texts[row] for row in keep]
        self.before = [self.before[row] for row in keep]

    @rule(counts=st.lists(lengths, min_size=1, max_size=2))
    def join(self, counts):
        texts = [self.tokens(count) for count in counts]
        other = type(self.single([])).merge([self.single(text) for text in texts])
        self.batch.extend(other)
        self.texts += texts
        self.before += [0] * len(texts)
        if len(self.texts) > 5:
            self.batch.filter(range(5))
            self.texts, self.before = self.texts[:5], self.before[:5]

    @rule(count=st.integers(1, 40))
    def trim(self, count):
        if not self.batch.is_trimmable():
            return
        got = self.batch.trim(count)
        assert got == max(min(count, len(text)) for text in self.texts)
        self.texts = [text[: max(0, len(text) - count)] for text in self.texts]
        self.before = [0] * len(self.texts)

    @rule(data=st.data())
    def take_out_and_back(self, data):
        """Extract a row, save it, load it, and put it in the place of the row."""
        row = data.draw(st.integers(0, len(self.texts) - 1))
        taken = self.batch.extract(row)
        again = type(taken).from_state(taken.state)
        assert again.offset == len(self.texts[row])
        others = [r for r in range(len(self.texts)) if r != row]
        if others:
            self.batch.filter(others)
            self.batch.extend(type(taken).merge([again]))
        else:
            self.batch = type(taken).merge([again])
        for held in (self.texts, self.before):
            held.append(held.pop(row))

    @invariant()
    def holds_the_texts(self):
        if not hasattr(self, "texts"):
            return
        assert self.batch.offset.tolist() == [len(text) for text in self.texts]
        assert self.batch.empty() == (max(map(len, self.texts)) == 0)
        for cache, text, before in zip(
            self.batch.rows, self.texts, self.before, strict=True
        ):
            if not text:
                assert cache.empty()
                continue
            if self.windowed:
                text = text[max(0, before - (WINDOW - 1)) :]
            for got, want in zip(
                dequantize(*cache.compressed()), vectors([text]), strict=True
            ):
                assert got.shape == want.shape
                error = mx.linalg.norm(got - want) / mx.linalg.norm(want)
                assert error.item() < 0.02


class WindowMachine(Machine):
    """The same of `RotatingTurboQuantCache`."""

    windowed = True


@pytest.mark.parametrize("machine", [Machine, WindowMachine])
@pytest.mark.parametrize(
    "chosen", [None, InTiles(), Joining()], ids=["vectors", "tiles", "joined"]
)
def test_any_order_of_operations(machine, chosen, monkeypatch):
    monkeypatch.setattr(PagePool, "poisons", True)
    case = machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
    with backend(chosen):
        case().runTest()

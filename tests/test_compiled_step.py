"""Compiled steps: what a replay gives, stores and says, on a stand-in launcher.

The launcher attends to nothing. Its outputs depend on all of a launch's inputs, and on
no recent token behind the last, so a replay that took a wrong one would show.
"""

import copy
import functools
import gc
import math
import warnings
import weakref

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from helpers import MODEL, backend

import mlx_turboquant as tq
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.cache import traced
from mlx_turboquant.cli.generate import generate
from mlx_turboquant.errors import UnsupportedModelError
from mlx_turboquant.integrations import compiled_step
from mlx_turboquant.integrations.compiled_step import CompiledModel
from mlx_turboquant.integrations.conversation import Conversation
from mlx_turboquant.integrations.factory import make_prompt_cache
from mlx_turboquant.kernels.attention import AttendArguments
from mlx_turboquant.tiles import in_tiles

STORY = "Once upon a time there was an old king who had three sons. " * 5
SPEC = "k3v3,page=32,window=16,sink=4"
RECENT = AttendArguments._fields.index("recent")
pytestmark = pytest.mark.usefixtures("hooked")


@functools.cache
def waves(count):
    made = mx.sin(mx.arange(count) + 1.0)[:, None]
    mx.eval(made)
    return made


def folded(x):
    """(1, 1), of every element. Products and sums only: no fusing changes those."""
    flat = x.astype(mx.float32).reshape(1, -1)
    return flat @ (waves(flat.size) / flat.size)


class Folding:
    """A launcher whose kernels fold their inputs up."""

    name = "folding"

    def __call__(self, launch, inputs):
        inputs = dict(zip(launch.kernel.inputs, inputs, strict=True))
        if "recent_keys" in inputs:
            recent = inputs["arguments"][RECENT]
            for name in ("recent_keys", "recent_values"):
                if inputs[f"sink_{name[7:]}"] is inputs[name]:
                    del inputs[f"sink_{name[7:]}"]  # there is no sink
                rows = mx.arange(inputs[name].shape[2])[:, None]
                seen = mx.where(rows < recent, inputs[name], 0)
                inputs[name] = mx.sum(seen * waves(len(rows)), axis=2)
        total = sum(folded(x) for x in inputs.values() if x.dtype != mx.uint32)
        return [
            (waves(math.prod(shape)) @ total).reshape(shape).astype(dtype)
            for shape, dtype in zip(
                launch.output_shapes, launch.output_dtypes, strict=True
            )
        ]


class FoldingGpu(Gpu):
    """The GPU backend with its attention folded up, codes made by the CPU."""

    def __init__(self):
        super().__init__(Folding(), simdgroups=64)

    def encode(self, quantizer, x, first):
        return self.arranged(quantizer, quantizer.encode(x, first))

    def arranged(self, quantizer, codes):
        return in_tiles(codes, quantizer.layout)

    channel_gains = Reference.channel_gains


@pytest.fixture
def gpu():
    chosen = FoldingGpu()
    with backend(chosen):
        yield chosen


class Counting:
    """A model that counts how often its own code runs."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **options):
        self.calls += 1
        return self.model(*args, **options)


def prefilled(model, spec=SPEC, tokens=90):
    cache = make_prompt_cache(model, spec)
    ids = mx.random.randint(0, tiny_models.VOCAB, (1, tokens), key=mx.random.key(3))
    mx.eval(model(ids, cache=cache), [layer.state for layer in cache])
    return cache


def run(model, cache, steps, token=1):
    """Logits of greedy steps."""
    rows, token = [], mx.array([[token]], mx.uint32)
    for _ in range(steps):
        rows.append(model(token, cache=cache))
        token = mx.argmax(rows[-1][:, -1:], axis=-1)
        mx.async_eval(token)
    return mx.concatenate(rows, axis=1)


def same(a, b):
    return mx.array_equal(a, b, equal_nan=True).item()


def assert_same_state(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.offset == other.offset
        assert one.recent_length == other.recent_length
        states = one.state, other.state
        assert states[0].keys() == states[1].keys()
        for name, held in states[0].items():
            other_held = states[1][name]
            equal = (
                same(held, other_held)
                if isinstance(held, mx.array)
                else held == other_held
            )
            assert equal, name


def tiny(name="llama", **config):
    """A model with a plain cache for each layer."""
    with pytest.MonkeyPatch.context() as patch:
        odd = {"layer_types": ["full_attention"] * 4, "head_dim": 32, **config}
        patch.setitem(tiny_models.ODD, name, odd)
        return tiny_models.build(name)


@pytest.mark.parametrize("head_dim", [16, 32])  # rotated by operations, by kernels
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma"])
def test_equal_to_the_model_over_two_page_turns(gpu, name, head_dim):
    model = tiny(name, head_dim=head_dim)
    eager_cache, cache = prefilled(model), prefilled(model)
    counted = Counting(model)
    compiled = CompiledModel(counted)
    want, got = run(model, eager_cache, 80), run(compiled, cache, 80)
    assert same(got, want)
    assert_same_state(cache, eager_cache)
    # Pages turn at 116 and at 148 of 170 tokens. One step as it is, one trace for each.
    assert cache[0].packed_length == 128
    assert counted.calls == 2 * 3
    assert compiled.uncompiled == tq.explain(cache).uncompiled == ""


def test_specs_may_differ_by_layer(gpu):
    specs = ["k3v3,page=32,window=16", "k4v2,page=64,window=8,sink=0"] * 2
    model = tiny()
    eager_cache, cache = prefilled(model, specs), prefilled(model, specs)
    counted = Counting(model)
    want, got = run(model, eager_cache, 70), run(CompiledModel(counted), cache, 70)
    assert same(got, want)
    assert_same_state(cache, eager_cache)
    assert counted.calls < 20


@pytest.mark.parametrize(("count", "calls"), [(3, 0), (20, 2)])
def test_trims_in_between(gpu, count, calls):
    """Of recent tokens, which keeps the trace, and of codes."""
    model = tiny()
    eager_cache, cache = prefilled(model), prefilled(model)
    counted = Counting(model)
    compiled = CompiledModel(counted)
    run(model, eager_cache, 5), run(compiled, cache, 5)
    cut = count + cache[0].recent_length - 5 if calls else count
    before = counted.calls
    for layer in [*eager_cache, *cache]:
        assert layer.trim(cut) == cut
    assert same(run(compiled, cache, 4), run(model, eager_cache, 4))
    assert_same_state(cache, eager_cache)
    assert counted.calls == before + calls


def test_copies_and_saved_caches_go_their_own_way(gpu, tmp_path):
    model = tiny()
    cache = prefilled(model)
    compiled = CompiledModel(model)
    run(compiled, cache, 5)
    copied = copy.deepcopy(cache)
    tq.save_prompt_cache(tmp_path / "five", cache)
    want = run(compiled, cache, 4, token=7)
    run(compiled, cache, 4, token=9)
    loaded = tq.load_prompt_cache(tmp_path / "five.safetensors", model)
    for other in (copied, loaded):
        assert same(run(compiled, other, 4, token=7), want)
        assert other[0].offset == 99


def test_prompts_and_batches_are_the_models(gpu):
    model = tiny()
    eager_cache, cache = prefilled(model), prefilled(model)
    compiled = CompiledModel(model)
    ids = mx.array([[1, 2, 3, 4, 5]])
    for _ in range(3):
        assert same(run(compiled, cache, 4), run(model, eager_cache, 4))
        assert same(compiled(ids, cache=cache), model(ids, cache=eager_cache))
        step = compiled(ids[:, :1], cache), model(ids[:, :1], eager_cache)
        assert same(*step)
    assert_same_state(cache, eager_cache)
    assert same(compiled(ids), model(ids))
    batch = mx.array([[1], [2]])
    assert same(compiled(batch), model(batch))


def test_nothing_is_written_past_the_buffers(gpu):
    """Full buffers grow in a step of the model's own."""
    model = tiny()
    eager_cache, cache = prefilled(model), prefilled(model)
    for layer in [*eager_cache, *cache]:
        recent = layer._tokens.recent
        tight = {name: rows[:, :, : recent.length + 3] for name, rows in
                 recent.arrays.items()}  # fmt: skip
        recent.arrays = {name: mx.contiguous(rows) for name, rows in tight.items()}
    counted = Counting(model)
    assert same(run(CompiledModel(counted), cache, 10), run(model, eager_cache, 10))
    assert_same_state(cache, eager_cache)
    assert counted.calls == 2 * 2


class ReadsItsOffset(Counting):
    """A model that wants the position as a number."""

    def __call__(self, inputs, cache=None):
        if cache is not None and int(cache[0].offset) < 0:
            raise AssertionError
        return super().__call__(inputs, cache=cache)


def test_a_model_that_cannot_be_traced_says_so(gpu):
    plain = tiny()
    model = ReadsItsOffset(plain)
    eager_cache, cache = prefilled(model), prefilled(model)
    compiled = CompiledModel(model)
    want, before = run(plain, eager_cache, 40), model.calls
    assert same(run(compiled, cache, 40), want)
    assert model.calls == before + 40
    assert_same_state(cache, eager_cache)
    explained = tq.explain(cache)
    assert explained.uncompiled == compiled.uncompiled
    assert explained.uncompiled.startswith("the model cannot be traced (")
    assert f"steps are not compiled: {explained.uncompiled}" in str(explained)


class FailsOnce(Counting):
    """A model with one bad step, its first trace."""

    failed = False

    def __call__(self, inputs, cache=None):
        if isinstance(cache[0], traced.TracedLayer) and not self.failed:
            self.failed = True
            raise RuntimeError("no memory left")
        return super().__call__(inputs, cache=cache)


def test_after_a_failed_step_the_next_prompt_is_a_new_start(gpu):
    plain = tiny()
    model = FailsOnce(plain)
    eager_cache, cache = prefilled(model), prefilled(model)
    compiled = CompiledModel(model)
    assert same(run(compiled, cache, 4), run(plain, eager_cache, 4))
    assert "no memory left" in tq.explain(cache).uncompiled
    ids = mx.array([[1, 2, 3]])
    assert same(compiled(ids, cache=cache), plain(ids, cache=eager_cache))
    before = model.calls
    assert same(run(compiled, cache, 4), run(plain, eager_cache, 4))
    assert model.calls == before + 2  # one as it is, one trace
    assert compiled.uncompiled == ""


def test_caches_that_are_no_caches_of_ours_take_steps_of_the_models(gpu):
    """Between two steps over ours: a page is active when they come."""
    model = tiny()
    cache = prefilled(model)
    compiled = CompiledModel(model)
    run(compiled, cache, 2)
    assert compiled._page is not None
    compiled._model = lambda inputs, cache: inputs + 1
    assert compiled(mx.array([[1]]), cache=[object()] * 4).item() == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exaone4", "RotatingTurboQuantCache"),
        ("falcon_h1", "CacheList"),
        ("gemma2", "computes attention itself"),
    ],
)
def test_caches_that_no_trace_serves_are_named(gpu, name, reason):
    model = tiny_models.build(name)
    with warnings.catch_warnings(action="ignore"):
        caches = [prefilled(model, "3,page=32,window=8,sink=0") for _ in range(2)]
    compiled = CompiledModel(model)
    assert same(run(compiled, caches[0], 4), run(model, caches[1], 4))
    assert reason in tq.explain(caches[0]).uncompiled


def test_a_model_that_reads_the_tokens_number_is_not_traced(gpu):
    layer = prefilled(tiny())[0]
    number = mx.array([90])
    traced_layer = traced.TracedLayer(layer, number, number, traced.buffers_of(layer))
    token = mx.zeros((1, 2, 1, 32))
    for side in traced_layer.update_and_fetch(token, token):
        with pytest.raises(UnsupportedModelError, match="shape of its cached keys"):
            _ = side.shape
        with pytest.raises(UnsupportedModelError, match="how many tokens"):
            _ = side.stored_length
    with pytest.raises(UnsupportedModelError, match="more than one token"):
        traced_layer.update_and_fetch(token, token)
    with pytest.raises(UnsupportedModelError, match="hides tokens"):
        traced_layer.make_mask(1, window_size=8)


def test_what_is_not_compiled_says_why(gpu):
    model = tiny()
    compiled = CompiledModel(model)
    short = prefilled(model, tokens=20)
    run(compiled, short, 3)
    assert tq.explain(short).uncompiled == "no page is packed yet"
    batch = make_prompt_cache(model, SPEC)
    compiled(mx.ones((2, 90), mx.uint32), cache=batch)
    compiled(mx.ones((2, 1), mx.uint32), cache=batch)
    assert tq.explain(batch).uncompiled == "a step of 2 rows is not traced"
    run(compiled, prefilled(model), 3)
    assert compiled.uncompiled == ""


def test_apply_sets_up_the_model_itself(gpu):
    model = tiny()
    tq.apply(CompiledModel(model), SPEC)
    assert type(model.make_cache()[0]) is tq.TurboQuantCache


def test_codes_of_a_cache_that_is_gone_are_freed(gpu):
    model = tiny()
    compiled = CompiledModel(model)
    cache = prefilled(model)
    run(compiled, cache, 5)
    gone = [weakref.ref(layer) for layer in cache]
    gc.disable()  # no circle may keep them
    try:
        del cache
        assert all(layer() is None for layer in gone)
        assert compiled._page is None
    finally:
        gc.enable()


def test_it_is_made_for_a_gpu_only():
    model = tiny()
    assert tq.compiled(model) is model  # on the CPU
    with backend(FoldingGpu()):
        compiled = tq.compiled(model)
        assert isinstance(compiled, CompiledModel)
        assert compiled.layers is model.layers


def test_generate_and_chat_use_it(gpu, books, monkeypatch):
    replays = []
    replay = compiled_step._Page.__call__

    def noted(page, inputs, caches):
        replays.append(caches[0].offset)
        return replay(page, inputs, caches)

    monkeypatch.setattr(compiled_step._Page, "__call__", noted)
    options = {"kv_bits": "3", "max_tokens": 8, "verbose": "False"}
    text = "Once upon a time there was " * 80
    generate(model=str(MODEL), prompt=text, **options)
    assert len(replays) == 8
    replays.clear()
    generate(model=str(MODEL), prompt=text, draft_model=str(MODEL), **options)
    assert not replays
    model, tokenizer = books
    talk = Conversation(model, tokenizer, lambda: make_prompt_cache(model, "3"))
    for _ in talk.say(text, max_tokens=8):
        pass
    assert len(replays) == 8


def test_a_turn_said_again_replays_on_its_own_cache(gpu, books):
    """It reads one token: a step, over a fork of what was traced last."""
    model, tokenizer = books
    said = []

    def codes(caches):
        return [np.array(cache.state["packed:keys_words"]) for cache in caches]

    for is_compiled in (True, False):
        talk = Conversation(model, tokenizer, lambda: make_prompt_cache(model, SPEC))
        if not is_compiled:
            talk._stepping = model
        for _ in range(2):
            said.append([r.token for r in talk.say(STORY, max_tokens=40)])
            kept, count, before = talk.cache, talk.tokens, codes(talk.cache)
            talk.undo()
        said.append([r.token for r in talk.say(STORY, max_tokens=20)])
        assert talk.cached_tokens == count - 41
        assert {cache.offset for cache in kept} == {count}
        pairs = zip(before, codes(kept), strict=True)
        assert all(np.array_equal(*pair) for pair in pairs)
    assert said[:3] == said[3:]

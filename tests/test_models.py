"""Every model type of mlx-lm: what it does with a compressed cache, and its logits."""

import gc

import mlx.core as mx
import pytest
import support_table
import tiny_models
from mlx_lm import batch_generate, stream_generate
from mlx_lm.models.cache import RotatingKVCache

import mlx_turboquant as tq
from mlx_turboquant.errors import UnsupportedModelError
from mlx_turboquant.integrations import probe
from mlx_turboquant.integrations.stock import stock_caches

TYPES = list(tiny_models.types())
DOCUMENTED = support_table.parts()[0].splitlines()
#: They have no keys and values, or in a cache of the model's own.
REFUSED = ("deepseek_v41", "mamba", "mamba2", "rwkv7")

pytestmark = pytest.mark.filterwarnings("ignore:.*caches")


@pytest.mark.parametrize("name", TYPES)
def test_eight_bits_agree_with_stock(name, hooked):
    model = tiny_models.build(name)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError) as caught:
            tq.make_prompt_cache(model, support_table.SPEC)
        assert support_table.refusal(name, caught.value) in DOCUMENTED
        return
    caches = tq.make_prompt_cache(model, support_table.SPEC)
    got = tiny_models.logits(model, caches)
    want = tiny_models.logits(model, stock_caches(model))
    error = mx.sqrt(mx.mean((got - want) ** 2)) / mx.std(want)
    assert 0 < error.item() < 0.01
    assert support_table.row(name, caches) in DOCUMENTED, (
        "docs/models.md is not true any more; run python tests/support_table.py"
    )
    for row in tq.explain(caches).layers:
        if row.spec:  # something was packed, or all of this says nothing
            assert row.tokens[1] > 0


def test_the_table_has_every_type_once():
    lines = [line for line in DOCUMENTED if line.startswith("| ")]
    rows = [support_table.name_of(line) for line in lines]
    assert rows[0] == "model type"
    assert rows[1:] == sorted([*TYPES, *tiny_models.NOT_BUILT])
    for paragraph in support_table.summary(lines[1:]):
        assert paragraph in support_table.FILE.read_text()


def noisy(leaf, size, seed):
    """mlx-lm's cache, with noise of this size on all vectors, relative to each."""
    kind = type(leaf)

    class Noisy(kind):
        def update_and_fetch(self, *sides):
            keys = mx.random.split(mx.random.key(seed + 97 * self.offset), 2)
            added = []
            for x, key in zip(sides, keys, strict=True):
                norm = mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True))
                added.append(x + size * norm * mx.random.normal(x.shape, key=key))
            return kind.update_and_fetch(self, *added)

    copied = Noisy.__new__(Noisy)
    copied.__dict__.update(leaf.__dict__)
    return copied


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("afm7", {"rounding": 0.5}),
        ("laguna", {"num_experts_per_tok": 1}),
        ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("step3p5", {"moe_top_k": 1}),
    ],
)
def test_what_a_rounding_moves_is_no_fault_of_the_codes(name, changes, hooked):
    """Noise of the codes' size on mlx-lm's own caches moves such a model as far."""
    model = tiny_models.build(name, **changes)
    want = tiny_models.logits(model, stock_caches(model))

    def error(caches):
        got = tiny_models.logits(model, caches)
        return (mx.sqrt(mx.mean((got - want) ** 2)) / mx.std(want)).item()

    codes = error(tq.make_prompt_cache(model, support_table.SPEC))
    noise = [
        error([noisy(leaf, 0.005, seed) for leaf in stock_caches(model)])
        for seed in range(4)
    ]
    assert max(noise) > 0.01
    assert codes < 1.2 * max(noise)
    assert name in support_table.NOTES


@pytest.mark.parametrize(
    "name",
    [
        *("afm7", "deepseek_v3", "deepseek_v32", "falcon_h1", "gemma2", "gemma3n"),
        *("gemma4_text", "gpt_oss", "iquestloopcoder", "llama", "minimax_m3_vl"),
    ],
)
def test_bounded_caches_agree_with_stock(name, hooked):
    """``max_kv_size`` in every kind of model: windows, sharing, arrays, an index."""
    model = tiny_models.build(name)
    bound = tiny_models.WINDOW
    caches = tq.make_prompt_cache(model, support_table.SPEC, max_kv_size=bound)
    got = tiny_models.logits(model, caches)
    want = tiny_models.logits(model, stock_caches(model, bound))
    error = mx.sqrt(mx.mean((got - want) ** 2)) / mx.std(want)
    assert 0 < error.item() < 0.01
    packed = [row for row in tq.explain(caches).layers if row.spec]
    assert all(row.cache == "RotatingTurboQuantCache" for row in packed)


@pytest.mark.parametrize("name", ["gpt_oss", "mimo_v2_flash"])
def test_learned_sinks_matter_and_are_exact(name, hooked):
    """Without them the logits would be others: the 1% above is not luck."""
    model = tiny_models.build(name)
    caches = tq.make_prompt_cache(model, support_table.SPEC)
    got = tiny_models.logits(model, caches)

    def silence(path, module):
        for field in ("sinks", "attention_sink_bias"):
            if field in module:
                module[field] = mx.full(module[field].shape, -1e9)

    model.apply_to_modules(silence)
    without = tiny_models.logits(model, stock_caches(model))
    error = mx.sqrt(mx.mean((got - without) ** 2)) / mx.std(got)
    assert error.item() > 0.02


@pytest.mark.parametrize(
    "name",
    [
        *("afm7", "deepseek_v3", "deepseek_v32", "falcon_h1", "gemma3n", "gpt_oss"),
        *("gemma4_text", "lfm2", "llama", "mimo_v2_flash", "mistral4", "plamo"),
        *("qwen3_5", "qwen3_next", "stablelm", "cohere2"),
    ],
)
def test_batches_equal_single_streams(name, books, hooked):
    """mlx-lm's continuous batching, rows shorter and longer than windows."""
    model, (_, tokenizer) = tiny_models.build(name), books
    tq.apply(model, support_table.SPEC)
    prompts = [list(range(3, 3 + count)) for count in (90, 7, 41)]
    options = {"max_tokens": 12, "prefill_step_size": 32}
    got = batch_generate(model, tokenizer, prompts, return_token_ids=True, **options)
    for prompt, ids in zip(prompts, got.token_ids, strict=True):
        steps = stream_generate(model, tokenizer, prompt, **options)
        assert ids == [step.token for step in steps]


def test_short_windows_stay_stock_and_say_so(hooked):
    model = tiny_models.build("gpt_oss")
    with pytest.warns(UserWarning, match=r"2 of 4 .* window of 80 tokens is too short"):
        caches = tq.make_prompt_cache(model, "3")
    assert [type(c) for c in caches[::2]] == [RotatingKVCache] * 2


def test_models_that_compute_attention_themselves_are_warned_of(hooked):
    model = tiny_models.build("gemma2")
    with pytest.warns(UserWarning, match=r"4 of 4 .* gemma2 computes attention itself"):
        caches = tq.make_prompt_cache(model, "3,page=32,window=4")
    tiny_models.logits(model, caches)
    assert all("decodes all" in row.backend for row in tq.explain(caches).layers)


def test_the_dry_run_reads_no_weight(hooked):
    """A model of lazily loaded weights is not read by `apply`."""
    model = tiny_models.build("deepseek_v3")
    model.model.embed_tokens.weight = mx.random.normal((1 << 20, 64))
    gc.collect()  # or what other tests left would go while this one measures
    before = mx.get_active_memory()
    entries = probe.entries_of(model, stock_caches(model))
    assert all(entry.decision == "returns_arrays" for entry in entries)
    assert {entry.shape for entry in entries} == {(1, 32, 8)}
    assert mx.get_active_memory() - before < 1 << 20
    mx.eval(model.model.embed_tokens.weight)
    assert mx.get_active_memory() - before >= 256 << 20


def test_a_model_that_always_fails_is_refused_with_its_own_words(monkeypatch):
    model = tiny_models.build("llama")

    def broken(*args, **kwargs):
        raise ValueError("no such luck")

    monkeypatch.setattr(type(model), "__call__", broken)
    with pytest.raises(UnsupportedModelError, match=r"few tokens .*no such luck"):
        tq.make_prompt_cache(model, "3")

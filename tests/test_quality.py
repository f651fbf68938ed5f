"""Quality on real text, through the real cache, beside mlx-lm's own quantization.

Windows are short so that CI stays fast; ``mlx_tq.eval`` is the long form. Every stored
bit is counted, windows and sinks included.
"""

import mlx.core as mx
import pytest
from helpers import ROOT
from mlx_lm import generate, stream_generate

import mlx_turboquant as tq
from mlx_turboquant.evals import text
from mlx_turboquant.evals.pathologies import NAMES

LENGTH = 512
#: No window, no sink: every token but the last page is read as codes.
BARE = "window=0,sink=0,page=32"
PLAN = tq.EvalPlan(
    lengths=(LENGTH,), windows=1, scored=128, stepped=64, needles=(), greedy=0
)


@pytest.fixture(scope="module")
def scores(books):
    """Rows of an evaluation by (cache, mode)."""
    specs = [f"k{b}v{b},{kind}" for b in (2, 3, 4) for kind in ("page=32", BARE)]
    baselines = [f"affine:{b}" for b in (2, 3, 4)]
    found = tq.evaluate(*books, specs, baselines=baselines, plan=PLAN)
    names = {f"affine:{b}": f"affine{b}" for b in (2, 3, 4)}
    names |= {f"k{b}v{b},page=32": f"ours{b}" for b in (2, 3, 4)}
    rows = {}
    for mode in ("chunked", "stepped"):
        for row in found.rows(mode=mode):
            name = names.get(row.name, f"bare{row.name[1]}")
            rows[name, mode] = row
    return rows


each_mode = pytest.mark.parametrize("mode", ["chunked", "stepped"])


@each_mode
def test_three_bits_beat_mlx_lms_three(scores, mode):
    """3.125 bits of code and scale against 3.5, without any window to help."""
    assert scores["bare3", mode].kld < 0.5 * scores["affine3", mode].kld
    assert scores["bare3", mode].top1 > scores["affine3", mode].top1


@each_mode
def test_four_bits_lose_less_than_half_of_mlx_lms_four(scores, mode):
    """4.125 bits of code and scale against 4.5."""
    assert scores["bare4", mode].kld < 0.5 * scores["affine4", mode].kld


def test_more_bits_less_divergence(scores):
    for kind in ("ours", "bare", "affine"):
        klds = [scores[f"{kind}{bits}", "chunked"].kld for bits in (2, 3, 4)]
        assert klds[0] > 2 * klds[1] > 4 * klds[2] > 0


def test_bits_are_what_the_codec_says(scores):
    for bits in (2, 3, 4):
        bare = scores[f"bare{bits}", "stepped"].bits
        # Codes and scales, page means on the keys, at most a page uncompressed.
        least = bits + 0.125 + 16 / 32 / 2
        assert least < bare < least + 16 * 32 / LENGTH
        assert scores[f"affine{bits}", "stepped"].bits == bits + 0.5


def test_window_and_sink_help(scores):
    for bits in (2, 3, 4):
        ours, bare = scores[f"ours{bits}", "chunked"], scores[f"bare{bits}", "chunked"]
        assert ours.kld < bare.kld


@pytest.fixture(scope="module")
def sick(books):
    """KLD of the default preset by pathology, over seeds and windows."""
    plan = tq.EvalPlan(
        lengths=(384,), windows=3, scored=128, stepped=0, needles=(), greedy=0
    )
    found = tq.evaluate(*books, ("3",), baselines=(), plan=plan, pathology=NAMES)
    return {name: found.rows(name)[0].kld for name in ("", *NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_no_pathology_costs_the_default_preset_more_than_half(sick, name):
    print(f"{name}: {sick[name]:.5f}, {sick[name] / sick['']:.2f}x")
    assert sick[name] < 1.5 * sick[""]


def test_a_trellis_of_three_bits_beats_the_papers_rule_at_three_and_a_half(books):
    """At half a bit less; and sign sketches are worse at the same bits."""
    plan = tq.EvalPlan(
        lengths=(512,), windows=2, seeds=1, scored=160, stepped=0, needles=(), greedy=0
    )
    names = (
        "k3v3,codec=trellis",
        "k4v3,codec=research.turboquant-plain",
        "k3v3,codec=research.qjl",
    )
    specs = [f"{name},{BARE}" for name in names]
    coded, plain, sketched = tq.evaluate(*books, specs, baselines=(), plan=plan).rows()
    print([(row.name, row.bits, row.kld) for row in (coded, plain, sketched)])
    assert coded.bits < plain.bits - 0.45
    assert coded.kld < plain.kld
    assert sketched.bits == coded.bits
    assert sketched.kld > 5 * coded.kld


def test_bits_chosen_by_layer_are_no_worse_than_the_same_everywhere(books):
    """At equal bits, over seeds and windows."""
    plan = tq.EvalPlan(
        lengths=(512,), windows=3, scored=128, stepped=0, needles=(), greedy=0
    )
    specs = ("auto,budget=3", "3", "auto", "auto,quality=small")
    rows = tq.evaluate(*books, specs, baselines=(), plan=plan).rows()
    chosen, uniform, balanced, small = rows
    print([(row.name, row.bits, row.kld) for row in rows])
    assert chosen.bits <= uniform.bits + 0.01
    assert chosen.kld < 1.05 * uniform.kld
    assert small.bits < balanced.bits
    assert small.kld > 2 * balanced.kld


@pytest.mark.parametrize("prompt", ["It was a dark night, and", "“My dear sir,” said"])
def test_eight_bits_write_the_same_200_tokens(books, prompt, hooked):
    model, tokenizer = books
    tokens = []
    for cache in (None, tq.make_prompt_cache(model, 8)):
        steps = stream_generate(
            model, tokenizer, prompt, max_tokens=200, prompt_cache=cache
        )
        tokens.append([step.token for step in steps])
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 200
    assert cache[0].packed_length >= 128


@pytest.mark.parametrize("spec", ["2", "3", "4"])
def test_the_needle_is_found_through_the_codes(books, spec, hooked):
    """The fact stands 1,000 tokens back, long since packed."""
    model, tokenizer = books
    prompt = (ROOT / "examples" / "needle.txt").read_text()
    cache = tq.make_prompt_cache(model, spec)
    text = generate(model, tokenizer, prompt, max_tokens=8, prompt_cache=cache)
    assert "48213" in text
    assert cache[0].packed_length > 1500


def test_prefill_then_step_equals_one_prefill(books, hooked):
    """Through the model: to what quantization of one token's step can change."""
    model, tokenizer = books
    ids = mx.array(text.windows(text.books(), tokenizer, 257, 1)[0])[None]
    whole, cut = (tq.make_prompt_cache(model, 8) for _ in range(2))
    model(ids, cache=whole)
    model(ids[:, :256], cache=cut)
    model(ids[:, 256:], cache=cut)
    step = mx.array([[7]])
    got, want = model(step, cache=cut), model(step, cache=whole)
    assert mx.abs(got - want).max().item() < 0.02 * mx.std(want).item()

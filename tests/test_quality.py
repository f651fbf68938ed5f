"""Quality on real text, through the real cache, beside mlx-lm's own quantization.

Windows are short so that CI stays fast; ``benchmarks/bench_quality.py`` is the long
form. Every stored bit is counted, windows and sinks included.
"""

import mlx.core as mx
import pytest
from helpers import ROOT
from mlx_lm import generate, stream_generate
from quality import affine, compare, log_probs, ours, stock, windows

import mlx_turboquant as tq

LENGTH = 512
#: No window, no sink: every token but the last page is read as codes.
BARE = "window=0,sink=0,page=16"


@pytest.fixture(scope="module")
def scores(books):
    """Quality by (cache, chunk): the last 96 tokens one by one, or all in chunks."""
    model, tokenizer = books
    texts = windows(tokenizer, LENGTH, 1)
    found = {}
    for chunk, head in ((1, LENGTH - 97), (32, 32)):
        base = [log_probs(model, text, stock(model), chunk, head) for text in texts]
        kinds = {f"affine{b}": affine(b) for b in (2, 3, 4, 8)}
        kinds |= {f"ours{b}": ours(f"k{b}v{b}") for b in (2, 3, 4)}
        kinds |= {f"bare{b}": ours(f"k{b}v{b},{BARE}") for b in (2, 3, 4)}
        for name, make in kinds.items():
            found[name, chunk] = compare(model, texts, base, make, chunk, head)
    for (name, chunk), score in found.items():
        print(
            f"{name:8s} chunk {chunk:2d}  {score.bits:5.2f} bits  KLD {score.kld:.5f}  "
            f"p99 {score.kld_p99:.4f}  top-1 {score.top1:.4f}  "
            f"perplexity {score.perplexity:.3f}"
        )
    tq.uninstall()
    return found


@pytest.mark.parametrize("chunk", [1, 32])
def test_three_bits_beat_mlx_lms_three(scores, chunk):
    """3.125 bits of code and scale against 3.5, without any window to help."""
    assert scores["bare3", chunk].kld < scores["affine3", chunk].kld
    assert scores["bare3", chunk].top1 > scores["affine3", chunk].top1


@pytest.mark.parametrize("chunk", [1, 32])
def test_four_bits_lose_less_than_half_of_mlx_lms_four(scores, chunk):
    """4.125 bits of code and scale against 4.5."""
    assert scores["bare4", chunk].kld < 0.5 * scores["affine4", chunk].kld


def test_more_bits_less_divergence(scores):
    for kind in ("ours", "bare", "affine"):
        klds = [scores[f"{kind}{bits}", 32].kld for bits in (2, 3, 4)]
        assert klds[0] > 2 * klds[1] > 4 * klds[2] > 0


def test_bits_are_what_the_codec_says(scores):
    for bits in (2, 3, 4):
        bare = scores[f"bare{bits}", 32].bits
        assert bits + 0.125 < bare < bits + 0.125 + 1.5
        assert scores[f"affine{bits}", 32].bits == bits + 0.5


def test_window_and_sink_help(scores):
    for bits in (2, 3, 4):
        assert scores[f"ours{bits}", 32].kld < scores[f"bare{bits}", 32].kld


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
    ids = mx.array(windows(tokenizer, 257, 1)[0])[None]
    whole, cut = (tq.make_prompt_cache(model, 8) for _ in range(2))
    model(ids, cache=whole)
    model(ids[:, :256], cache=cut)
    model(ids[:, 256:], cache=cut)
    step = mx.array([[7]])
    got, want = model(step, cache=cut), model(step, cache=whole)
    assert mx.abs(got - want).max().item() < 0.02 * mx.std(want).item()

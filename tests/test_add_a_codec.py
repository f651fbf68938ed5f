"""A codec from outside the package works in everything that a built-in one does."""

import runpy

import mlx.core as mx
import numpy as np
import pytest
from codec_tools import made, mse, vectors
from helpers import MODEL, ROOT, relative_error, softmax_attention, stored

import mlx_turboquant as tq
from mlx_turboquant.codecs import codec_names, registry
from mlx_turboquant.errors import FormatError

SPEC = "3,codec=uniform"


@pytest.fixture
def uniform(monkeypatch):
    """The example's codec, for one test."""
    codec_names(research=True)
    monkeypatch.setattr(registry, "_infos", dict(registry._infos))
    runpy.run_path(str(ROOT / "examples" / "add_a_codec.py"), run_name="add_a_codec")
    yield
    registry.codec_for.cache_clear()


def filled(spec, tokens=300):
    """A cache of random tokens, with queries (1, 4, 1, 64) for it."""
    cache = tq.TurboQuantCache(spec)
    kv = mx.random.normal((2, 1, 2, tokens, 64))
    q = mx.random.normal((1, 4, tokens, 64))
    tq.attend(q, *cache.update_and_fetch(kv[0], kv[1]), 0.125, "causal")
    return cache, q[:, :, -1:]


def test_it_obeys_the_laws(uniform):
    """Max (1960): .1188, .03744, .01154 for 2, 3 and 4 bits."""
    for bits, error in ((2, 0.1188), (3, 0.03744), (4, 0.01154)):
        codec = made("uniform", bits)
        codes = codec.encode(vectors(128, 5))
        assert tuple(codes.arrays) == codec.arrays
        assert 8 * codes.nbytes == 10 * codec.bits_per_vector
        assert mse(codec, vectors(128, 2000)) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(
    "spec", [SPEC, "k3v2,codec=uniform/trellis", "k16v4,codec=uniform"]
)
def test_caches_and_attention(spec, uniform):
    cache, q = filled(spec)
    sides = cache.update_and_fetch(*mx.random.normal((2, 1, 2, 1, 64)))
    want = softmax_attention(q, *map(stored, sides), 0.125)
    assert relative_error(tq.attend(q, *sides, 0.125), want) < 1e-5
    assert str(cache.spec) == str(tq.CacheSpec.parse(spec))
    assert "reference" in str(tq.explain([cache]))


def test_saved_and_loaded(uniform, tmp_path, monkeypatch):
    model, _ = tq.load(str(MODEL))
    cache = tq.make_prompt_cache(model, SPEC)
    ids = mx.array(np.random.default_rng(0).integers(0, 100, (1, 200)))
    mx.eval(model(ids, cache=cache))
    tq.save_prompt_cache(tmp_path / "cache.safetensors", cache)
    again = tq.load_prompt_cache(tmp_path / "cache.safetensors", model)
    step = mx.array([[5]])
    assert mx.array_equal(model(step, cache=cache), model(step, cache=again)).item()
    monkeypatch.delitem(registry._infos, "uniform")
    registry.codec_for.cache_clear()
    with pytest.raises(FormatError, match="codec 'uniform' is unknown"):
        tq.load_prompt_cache(tmp_path / "cache.safetensors", model)


def test_evaluated(uniform):
    model, tokenizer = tq.load(str(MODEL))
    plan = tq.EvalPlan(
        lengths=(256,), windows=1, seeds=1, scored=64, stepped=0, needles=(), greedy=0
    )
    specs = (f"{SPEC},window=0,page=32", "3,window=0,page=32")
    found = tq.evaluate(model, tokenizer, specs, baselines=(), plan=plan)
    rows = {row.name: row for row in found.rows()}
    assert len(rows) == 2
    ours, builtin = (rows[name] for name in rows)
    assert 0 < builtin.kld < ours.kld < 3 * builtin.kld
    assert ours.bits == builtin.bits

"""How many tokens fit: predictions held to caches that are really filled."""

import json
import re
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
import tiny_models
from helpers import MODEL, attend
from typer.testing import CliRunner

import mlx_turboquant as tq
from mlx_turboquant.cli import app
from mlx_turboquant.entries import CacheEntry, nbytes_of
from mlx_turboquant.errors import UnsupportedModelError
from mlx_turboquant.integrations.footprint import footprint, of_network
from mlx_turboquant.integrations.stock import labelled_leaves, stock_caches
from mlx_turboquant.memory import Footprint, tight_memory_warning

SPECS = ("8", "k4v3", "3", "2", "3,codec=trellis", "k16v4", "3,window=64,page=64")


def parse(spec):
    return tq.CacheSpec.parse(spec)


def entry(heads, k_dim, v_dim, window=None):
    """A cache of all tokens, or of a window."""
    kind = "KVCache" if window is None else "RotatingKVCache"
    return CacheEntry("0", kind, (heads, k_dim, v_dim), sliding_window=window)


def filled(cache, layer, tokens, step=512):
    """In fp16, as on the machines that `plan` is asked about."""
    heads, k_dim, v_dim = layer.shape
    for start in range(0, tokens, step):
        shape = (1, heads, min(step, tokens - start))
        k = mx.random.normal((*shape, k_dim)).astype(mx.float16)
        v = mx.random.normal((*shape, v_dim)).astype(mx.float16)
        attend(k, *cache.update_and_fetch(k, v), 0.1, "causal")
        mx.eval(cache.state)
    return cache.nbytes


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dims", [(64, 64), (64, 96)])
def test_predicted_bytes_are_those_of_a_filled_cache(spec, dims):
    layer = entry(2, *dims)
    got = Footprint([layer], 0, 0).cache_bytes(4000, parse(spec))
    want = filled(tq.TurboQuantCache(spec), layer, 4000)
    assert abs(got - want) < 0.03 * want
    # Of a short text, the most that it may be, be it a prompt or written.
    got = Footprint([layer], 0, 0).cache_bytes(1000, parse(spec))
    for step in (500, 16):
        want = filled(tq.TurboQuantCache(spec), layer, 1000, step)
        assert 0 <= got - want < 0.3 * want


def test_predicted_windows_too():
    layer = entry(2, 64, 64, window=1024)
    model = Footprint([layer], 0, 0)
    cache = tq.RotatingTurboQuantCache("3", 1024)
    want = filled(cache, layer, 3000, step=100)
    assert abs(model.cache_bytes(3000, parse("3")) - want) < 0.1 * want
    assert model.cache_bytes(3000, parse("3")) == model.cache_bytes(10**6, parse("3"))
    assert model.cache_bytes(3000) == 2 * 2 * 128 * 1024


def test_the_bundled_models_folder_is_all_it_needs():
    model = footprint(str(MODEL))
    assert model.weights == (MODEL / "model.safetensors").stat().st_size
    assert model.active == model.weights  # tied: the embedding is read as the head
    assert [layer.label for layer in model.layers] == [str(i) for i in range(8)]
    assert all(
        replace(layer, label="0", itemsize=2) == entry(2, 128, 128)
        for layer in model.layers
    )
    assert model.context == 8192


def test_tokens_that_fit_follow_from_the_bytes():
    model = Footprint([entry(8, 128, 128)] * 32, 4 * 10**9, 4 * 10**9)
    memory = 8 * 10**9
    fits = [model.tokens_in(memory, parse(s)) for s in ("8", "4", "3", "2")]
    assert fits == sorted(fits)
    assert model.tokens_in(memory) < fits[0]
    assert 4 < fits[2] / model.tokens_in(memory) < 5.2
    room = memory - model.weights
    for spec in (None, parse("3")):
        fit = model.tokens_in(memory, spec)
        assert model.prompt_bytes(fit, spec) <= room < model.prompt_bytes(fit + 1, spec)
    assert model.tokens_in(10**9) == 0


def test_speed_at_best_grows_with_the_text_and_never_beats_the_bytes():
    model = Footprint([entry(8, 128, 128)] * 32, 4 * 10**9, 4 * 10**9)
    speeds = [model.speed(n, parse("3")) for n in (1000, 10_000, 100_000, 10**6)]
    assert speeds == sorted(speeds)
    assert 0.95 < speeds[0] < 1.05
    ratio = model.cache_bytes(10**6) / model.cache_bytes(10**6, parse("3"))
    assert speeds[-1] < ratio
    assert model.speed(10**5, parse("4,codec=research.affine")) is None


@pytest.mark.parametrize("is_nvidia", [False, True])
def test_speed_is_said_only_where_decoding_was_timed(is_nvidia, monkeypatch):
    """What codes cost to decode is an H100's: of a Mac or a CPU it says nothing."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: is_nvidia)
    args = ["plan", "3", "--model", str(MODEL), "--memory", "0.1GB", "--kv-memory=9MB"]
    out = CliRunner().invoke(app.main, args).output
    (head,) = (line for line in out.splitlines() if line.startswith("cache "))
    (row,) = (line for line in out.splitlines() if line.startswith("k3v3 "))
    columns, cells = re.split(r"  +", head), re.split(r"  +", row)
    assert len(columns) == len(cells)
    assert ("speed at best" in columns) == ("NVIDIA H100" in out) == is_nvidia
    if is_nvidia:
        assert 1 < float(cells[columns.index("speed at best")]) < 5
    else:
        assert "speed: said on NVIDIA GPUs alone" in out


def test_of_experts_only_those_chosen_are_read():
    model = tiny_models.build("mixtral")
    network = of_network(model)
    assert network.active == network.weights  # all four are chosen in tiny models
    config = {**tiny_models.config("mixtral"), "num_experts_per_tok": 1}
    from mlx_turboquant.integrations import footprint as module

    whole, active = module._weight_bytes(model, config)
    experts = 4 * 3 * (64 * 96) * 4 * 2  # layers, matrices, shape, experts, bytes
    assert abs((whole - active) - 0.75 * experts) < 0.02 * experts


@pytest.mark.parametrize(
    ("name", "packed", "windows"),
    [
        ("gemma3_text", 4, {80, None}),
        ("deepseek_v32", 4, {None}),
        ("falcon_h1", 4, {None}),
        ("llama4", 1, {80, None}),
        ("mamba", 0, set()),
    ],
)
def test_shapes_of_every_kind_of_model(name, packed, windows):
    found = of_network(tiny_models.build(name))
    assert sum(layer.is_compressed for layer in found.layers) == packed
    assert {layer.sliding_window for layer in found.layers} == windows
    if name in ("falcon_h1", "mamba"):
        assert found.fixed > 0
    tq.uninstall()


def test_the_shapes_come_from_the_dry_run_that_made_the_caches(monkeypatch, hooked):
    model = tiny_models.build("gpt_oss")
    with pytest.warns(UserWarning, match="too short"):
        caches = tq.make_prompt_cache(model, "3")
    monkeypatch.setattr(type(model), "__call__", None)
    layers = of_network(model).layers
    assert [layer.label for layer in layers] == [e.label for e in caches.entries]
    assert {layer.shape for layer in layers} == {(2, 16, 16)}
    # A window that is too short for codes is counted as what it stays.
    short = Footprint([layers[0]], 0, 0)
    assert layers[0].sliding_window == 80
    assert short.cache_bytes(1000, parse("3")) == short.cache_bytes(1000)


def test_a_model_that_takes_no_compressed_cache_has_a_footprint(monkeypatch, hooked):
    """It may be run with mlx-lm's own caches."""
    model = tiny_models.build("llama")
    call = type(model).__call__

    def picky(self, inputs, cache=None):
        if isinstance(cache[0], tq.TurboQuantCache):
            raise ValueError("no such luck")
        return call(self, inputs, cache=cache)

    monkeypatch.setattr(type(model), "__call__", picky)
    found = of_network(model)
    assert {layer.shape for layer in found.layers} == {(2, 16, 16)}
    assert all("no such luck" in layer.reason for layer in found.layers)
    assert found.cache_bytes(999, parse("2")) == found.cache_bytes(999)


def test_a_text_that_does_not_fit_is_told_with_a_way_out():
    model = Footprint([entry(8, 128, 128)] * 32, 4 * 10**9, 4 * 10**9)

    def warning(tokens, spec=None):
        spec = None if spec is None else parse(spec)
        return tight_memory_warning(model, tokens, spec, 8 * 10**9)

    fits = model.tokens_in(8 * 10**9)
    assert warning(fits) is None
    assert re.fullmatch(
        rf"100000 tokens need 17\.4 GB with the weights, this machine has 8\.0 GB, "
        rf"enough for {fits}; --kv-bits 3 holds 12\d{{4}}",
        warning(100_000),
    )
    assert warning(100_000, "3") is None
    assert warning(100_000, "auto,budget=3") is None
    assert "--kv-bits 2" in warning(130_000, "3")
    assert ";" not in warning(10**6, "2")  # nothing holds more


def test_no_such_model_is_one_clear_error(tmp_path):
    with pytest.raises(UnsupportedModelError, match="cannot load model"):
        footprint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(UnsupportedModelError, match="no_such_type not supported"):
        footprint(str(tmp_path))


@pytest.mark.parametrize("spec", [None, "k4v4,page=32,window=8"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("seed_oss", mx.float32),
        ("gpt_oss", mx.float32),
        ("gemma3_text", mx.bfloat16),
        ("qwen3_next", mx.float32),
        ("falcon_h1", mx.bfloat16),
        ("nemotron_h", mx.float16),
        ("llama4", mx.float32),
        ("recurrent_gemma", mx.float32),
    ],
)
@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
@pytest.mark.filterwarnings("ignore:.*are decoded whole at each step")
def test_no_model_s_caches_ever_take_more_than_is_counted(name, dtype, spec, hooked):
    """In the model's dtype, chunks in windows included; nor 40% less at the most."""
    chunk, ids = 300, mx.random.randint(0, 96, (1, 1021))
    model = tiny_models.build(name, max_position_embeddings=4096)
    model.set_dtype(dtype)
    caches = tq.make_prompt_cache(model, spec) if spec else stock_caches(model)
    found, most = of_network(model), 0.0
    assert found.itemsize == dtype.size
    leaves = [leaf for _, leaf in labelled_leaves(caches)]
    start = 0
    for count in (chunk, chunk, chunk, 120, 1):
        mx.eval(model(ids[:, start : start + count], cache=caches))
        mx.eval([leaf.state for leaf in leaves])
        start += count
        counted = found.cache_bytes(start, spec and parse(spec), chunk)
        most = max(most, share := sum(map(nbytes_of, leaves)) / counted)
        assert share <= 1
    assert most > 0.6


def test_a_config_alone_says_what_a_loaded_model_s_caches_take(tmp_path, monkeypatch):
    """On a CPU all is float32; elsewhere the weights say, or else the config."""
    config = {**tiny_models.config("seed_oss"), "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert footprint(str(tmp_path)).itemsize == 4
    model = tiny_models.build("seed_oss")
    found = of_network(model)
    assert footprint(str(tmp_path)).cache_bytes(900) == found.cache_bytes(900)
    assert footprint(str(tmp_path), mx.bfloat16).cache_bytes(900) == (
        found.cache_bytes(900) / 2
    )
    module = sys.modules["mlx_turboquant.integrations.footprint"]
    monkeypatch.setattr(module, "is_cast_for_device", lambda: False)
    assert footprint(str(tmp_path)).itemsize == 2
    weights = {"a": mx.zeros((9, 9)), "b": mx.zeros(3, mx.float16)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    assert footprint(str(tmp_path)).itemsize == 4
    config = {**config, "torch_dtype": None}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert footprint(str(tmp_path)).itemsize == 2

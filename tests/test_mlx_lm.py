"""The seam with stock mlx-lm: hooks, factories, files, and undoing all of it."""

import importlib.util
import types
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.models.base as base
import mlx_lm.models.cache as host_cache
import pytest
import tiny_models
from mlx_lm.models import llama, qwen3
from test_batch import tiny_model

import mlx_turboquant as tq
from mlx_turboquant.errors import (
    FormatError,
    SpecError,
    UnsupportedError,
    UnsupportedModelError,
)
from mlx_turboquant.integrations import hook

IDS = mx.arange(1, 181)[None]


def logits(model, cache, step=60):
    out = [model(IDS[:, i : i + step], cache=cache) for i in range(0, 180, step)]
    return mx.concatenate(out, axis=1)


def test_eight_bit_logits_agree_with_stock(hooked):
    model = tiny_model()
    want = logits(model, host_cache.make_prompt_cache(model))
    got = logits(model, tq.make_prompt_cache(model, "8,page=32"))
    spread = mx.std(want).item()
    assert 0 < mx.abs(got - want).max().item() < 0.05 * spread


def test_hook_covers_only_this_models_modules_and_uninstall_undoes_it():
    model = tiny_model()
    stock = base.scaled_dot_product_attention
    tq.apply(model, "3")
    assert llama.scaled_dot_product_attention is hook.attend_or(stock)
    assert qwen3.scaled_dot_product_attention is stock
    assert base.scaled_dot_product_attention is stock
    assert host_cache.TurboQuantCache is tq.TurboQuantCache
    assert "make_cache" in vars(model)
    tq.uninstall()
    assert llama.scaled_dot_product_attention is stock
    assert not hasattr(host_cache, "TurboQuantCache")
    assert "make_cache" not in vars(model)
    assert type(host_cache.make_prompt_cache(model)[0]) is host_cache.KVCache


def test_other_caches_stay_bit_identical_under_the_hook(hooked):
    model = tiny_model()

    def run(kind):
        return logits(model, [kind() for _ in model.layers])

    kinds = (
        host_cache.KVCache,
        lambda: host_cache.RotatingKVCache(64, keep=4),
        lambda: host_cache.QuantizedKVCache(32, 8),
    )
    before = [run(kind) for kind in kinds]
    tq.apply(model, "3")
    for kind, want in zip(kinds, before, strict=True):
        assert mx.array_equal(run(kind), want).item()
    # With no cache at all too.
    assert mx.all(mx.isfinite(model(IDS))).item()


def test_apply_reaches_every_maker_and_can_be_applied_again(hooked):
    model = tiny_model()
    explanation = tq.apply(model, "k4v3")
    assert explanation.packed_layers == 2
    assert not explanation.left_alone
    made = host_cache.make_prompt_cache(model)
    assert [str(c.spec) for c in made] == ["k4v3"] * 2
    tq.apply(model, 2)
    assert str(host_cache.make_prompt_cache(model)[0].spec) == "k2v2"
    assert "make_cache" not in model.parameters()


def test_a_users_own_model_file_is_hooked(tmp_path, hooked):
    """As mlx-lm loads it: from a path, and never put into sys.modules."""
    path = tmp_path / "mine.py"
    source = Path(llama.__file__).read_text()
    path.write_text(source.replace("from .", "from mlx_lm.models."))
    spec = importlib.util.spec_from_file_location("custom_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stock_model = tiny_model()
    model = module.Model(
        module.ModelArgs.from_dict(vars(stock_model.args) | {"model_type": "mine"})
    )
    model.update(stock_model.parameters())
    want = logits(stock_model, tq.make_prompt_cache(stock_model, 4))
    got = logits(model, tq.make_prompt_cache(model, 4))
    assert mx.array_equal(got, want).item()


def test_sliding_layers_are_left_alone_and_reported(hooked):
    model = tiny_model()
    kinds = [host_cache.RotatingKVCache(64), host_cache.KVCache()]
    object.__setattr__(model, "make_cache", lambda: list(kinds))
    with pytest.warns(UserWarning, match=r"1 of 2 caches stay .*RotatingKVCache"):
        made = tq.make_prompt_cache(model, "3")
    assert made[0] is kinds[0]
    assert type(made[1]) is tq.TurboQuantCache
    rows = tq.explain(made).layers
    assert rows[0].reason.startswith("its window of 64 tokens is too short for 292")
    assert rows[1].spec == "k3v3"


def test_cache_lists_are_replaced_inside(hooked):
    model = tiny_models.build("falcon_h1")
    with pytest.warns(UserWarning, match="recurrent state"):
        made = tq.make_prompt_cache(model, "3")
    kinds = [type(c) for c in made[0].caches]
    assert kinds == [host_cache.ArraysCache, tq.TurboQuantCache]
    layers = [row.layer for row in tq.explain(made).layers]
    assert layers[:3] == ["0.0", "0.1", "1.0"]


def test_models_without_a_plain_cache_are_refused():
    model = tiny_model()
    kinds = [host_cache.RotatingKVCache(64) for _ in range(2)]
    object.__setattr__(model, "make_cache", lambda: kinds)
    with pytest.raises(UnsupportedModelError, match=r"none of the 2 .*too short"):
        tq.make_prompt_cache(model, 3)


def test_a_head_dim_out_of_reach_is_one_clear_error(hooked):
    cache = tq.TurboQuantCache("3")
    with pytest.raises(UnsupportedError, match=r"head_dim 4 is outside 8\.\.1024"):
        cache.update_and_fetch(mx.zeros((1, 1, 2, 4)), mx.zeros((1, 1, 2, 4)))


# Files.


def filled(model, spec="k4v3"):
    cache = tq.make_prompt_cache(model, spec)
    logits(model, cache)
    return cache


def next_logits(model, cache):
    return model(mx.array([[9]]), cache=cache)


def test_round_trip_through_mlx_lms_own_functions(tmp_path, hooked):
    model = tiny_model()
    cache = filled(model)
    file = str(tmp_path / "cache.safetensors")
    host_cache.save_prompt_cache(file, cache, {"note": "hi"})
    again, metadata = host_cache.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"note": "hi"}
    assert [str(c.spec) for c in again] == ["k4v3"] * 2
    want = next_logits(model, cache)
    assert mx.array_equal(next_logits(model, again), want).item()


def test_round_trip_in_a_fresh_process_state(tmp_path):
    """Nothing hooked, nothing registered: load_prompt_cache(path, model) does it."""
    model = tiny_model()
    cache = filled(model)
    tq.save_prompt_cache(tmp_path / "c", cache)
    want = next_logits(model, cache)
    tq.uninstall()
    again = tq.load_prompt_cache(tmp_path / "c.safetensors", model)
    assert mx.array_equal(next_logits(model, again), want).item()
    assert host_cache.can_trim_prompt_cache(again)
    assert host_cache.trim_prompt_cache(again, 30) == 30
    assert again[0].offset == 151
    tq.uninstall()


def test_empty_caches_round_trip(tmp_path, hooked):
    model = tiny_model()
    tq.save_prompt_cache(tmp_path / "e", tq.make_prompt_cache(model, "3"))
    again = tq.load_prompt_cache(tmp_path / "e.safetensors", model)
    assert all(c.empty() for c in again)
    assert mx.array_equal(
        logits(model, again), logits(model, tq.make_prompt_cache(model, "3"))
    ).item()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"precious")
    with pytest.raises(ValueError, match="not serializable"):
        tq.save_prompt_cache(file, [types.SimpleNamespace(state=[object()])])
    assert file.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [file]


def test_unreadable_files_are_one_clear_error(tmp_path, hooked):
    model = tiny_model()
    good = tmp_path / "good.safetensors"
    tq.save_prompt_cache(good, filled(model))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:5000])
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    foreign = tmp_path / "foreign.safetensors"
    mx.save_safetensors(str(foreign), {"weight": mx.zeros(3)})
    for path in (tmp_path / "none.safetensors", cut, text, foreign):
        with pytest.raises(FormatError, match="cannot read a prompt cache") as caught:
            tq.load_prompt_cache(path, model)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_one_flipped_bit_is_one_clear_error(tmp_path, hooked):
    model = tiny_model()
    file = tmp_path / "c.safetensors"
    tq.save_prompt_cache(file, filled(model), {"note": "hi"})
    assert tq.load_prompt_cache(file, model, return_metadata=True)[1] == {"note": "hi"}
    whole = bytearray(file.read_bytes())
    for place in (-1, -5000, -20000):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"damaged: its checksum|cannot read"):
            tq.load_prompt_cache(file, model)


def test_files_of_mlx_lms_own_caches_are_checked_too(tmp_path, hooked):
    model = tiny_model()
    stock = [host_cache.KVCache(), host_cache.RotatingKVCache(64, keep=4)]
    logits(model, stock)
    file = tmp_path / "c.safetensors"
    tq.save_prompt_cache(file, stock)
    again = tq.load_prompt_cache(file, model)
    want = next_logits(model, stock)
    assert mx.array_equal(next_logits(model, again), want).item()
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    with pytest.raises(FormatError, match="damaged"):
        tq.load_prompt_cache(file, model)


def test_a_cache_of_another_model_is_refused(tmp_path, hooked):
    model = tiny_model()
    tq.save_prompt_cache(tmp_path / "c", filled(model)[:1])
    with pytest.raises(UnsupportedModelError, match="1 layer caches, the model has 2"):
        tq.load_prompt_cache(tmp_path / "c.safetensors", model)


def test_speculative_decoding_runs_on_compressed_caches(books, hooked):
    """Draft and target compressed: same greedy text as without a draft."""
    model, tokenizer = books
    tq.apply(model, "k8v8")
    prompt = "The old man looked at the sea and"
    plain = mlx_lm.generate(model, tokenizer, prompt, max_tokens=60)
    drafted = mlx_lm.generate(
        model, tokenizer, prompt, max_tokens=60, draft_model=model, num_draft_tokens=3
    )
    assert drafted == plain


def test_a_spec_for_every_layer(books, hooked):
    """Two layers with more bits than the others, and a list that does not fit."""
    model, _ = books
    count = len(model.layers)
    specs = ["k4v3,page=32"] * 2 + ["k3v2,page=32"] * (count - 2)
    caches = tq.make_prompt_cache(model, specs)
    assert [str(c.spec) for c in caches] == [str(tq.CacheSpec.parse(s)) for s in specs]
    assert len({str(c.spec) for c in caches}) == 2
    with pytest.raises(SpecError, match=f"3 specs do not fit {count} layers"):
        tq.make_prompt_cache(model, ["3", "3", "4"])
    with pytest.raises(SpecError, match="an empty list of specs"):
        tq.make_prompt_cache(model, [])
    tq.apply(model, specs)
    assert [str(c.spec) for c in model.make_cache()] == [str(c.spec) for c in caches]

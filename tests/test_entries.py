"""One dry run per model: what it costs, when it is repeated, and where records go."""

import copy
import gc
import weakref

import mlx.core as mx
import mlx_lm.models.cache as host_cache
import pytest
import tiny_models
from mlx_lm.models import llama
from test_batch import tiny_model

import mlx_turboquant as tq
from mlx_turboquant.entries import CacheEntry, PromptCache
from mlx_turboquant.integrations import factory, probe
from mlx_turboquant.integrations.footprint import of_network
from mlx_turboquant.integrations.stock import stock_caches


@pytest.fixture
def counts(monkeypatch):
    """How often a tiny model made its own caches, and was run."""
    counted = {"stock": 0, "forward": 0}

    def count(name, method):
        inner = getattr(llama.Model, method)

        def counting(*args, **kwargs):
            counted[name] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(llama.Model, method, counting)

    count("stock", "make_cache")
    count("forward", "__call__")
    return counted


def test_a_model_is_run_once_and_its_caches_are_made_once(counts, hooked):
    """One dry run: a chunk and a decode step, which models have separate code for."""
    model = tiny_model()
    caches = tq.make_prompt_cache(model, "3")
    assert counts == {"stock": 1, "forward": len(probe._CALLS)}
    of_network(model)
    tq.explain(caches)
    assert counts == {"stock": 2, "forward": 2}  # the stock caches say if it changed
    tq.make_prompt_cache(model, "k4v3", max_kv_size=512)
    tq.apply(model, "2")
    model.make_cache()
    assert counts == {"stock": 5, "forward": 2}


def test_only_layers_that_fail_cost_more_runs(monkeypatch, hooked):
    runs = []
    dry_run = probe._try
    monkeypatch.setattr(probe, "_try", lambda *a: runs.append(1) or dry_run(*a))
    for name, count in (("llama", 1), ("deepseek_v3", 5)):
        runs.clear()
        model = tiny_models.build(name)
        probe.entries_of(model, stock_caches(model))
        assert len(runs) == count


def test_stock_caches_stay_empty_and_their_own(hooked):
    """The dry run works on copies: what mlx-lm made is what the prompt cache gets."""
    model = tiny_models.build("falcon_h1")
    stock = stock_caches(model)
    before = [dict(vars(leaf)) for entry in stock for leaf in entry.caches]
    entries = probe.entries_of(model, stock)
    assert [dict(vars(leaf)) for entry in stock for leaf in entry.caches] == before
    assert entries[0].label == "0.0"
    assert entries[0].state_bytes > 0
    assert (entries[1].shape, entries[1].state_bytes) == ((2, 16, 16), 0)


def test_a_split_model_is_run_again(counts, hooked):
    """By heads, as tensor parallelism does; or by layers, as a pipeline does."""
    model = tiny_model()
    heads = of_network(model).layers[0].shape[0]
    for layer in model.layers:
        attention = layer.self_attn
        attention.n_heads //= 2
        attention.n_kv_heads //= 2
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(attention, name).weight
            getattr(attention, name).weight = weight[: weight.shape[0] // 2]
        weight = attention.o_proj.weight
        attention.o_proj.weight = weight[:, : weight.shape[1] // 2]
    assert of_network(model).layers[0].shape[0] == heads // 2
    assert counts["forward"] == 4
    model.model.layers = model.model.layers[:1]
    assert len(of_network(model).layers) == 1
    assert counts["forward"] == 6


def test_a_dropped_model_is_forgotten(hooked):
    probe.forget()
    model = tiny_model()
    tq.apply(model, "3")
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert not probe._known


@pytest.mark.filterwarnings("ignore:.*caches")
def test_records_survive_copies_and_mlx_lms_own_path(hooked):
    model = tiny_models.build("deepseek_v32")
    tq.apply(model, "3")
    made = host_cache.make_prompt_cache(model)
    reason = "its keys choose tokens, nothing attends to them"
    for caches in (made, copy.deepcopy(made)):
        assert isinstance(caches, PromptCache)
        assert {row.reason for row in tq.explain(caches).left_alone} == {reason}
        for leaf in (leaf for entry in caches for leaf in entry.caches):
            known = (tq.TurboQuantCache, host_cache.KVCache)
            assert type(leaf) in known
            if type(leaf) is host_cache.KVCache:
                assert vars(leaf).keys() == vars(host_cache.KVCache()).keys()


def test_a_list_that_changed_says_what_its_classes_say():
    window = host_cache.RotatingKVCache(64)
    record = CacheEntry("0", "RotatingKVCache").left_alone("a reason of its own")
    caches = PromptCache([window], [record])
    assert tq.explain(caches).layers[0].reason == "a reason of its own"
    caches[0] = host_cache.ArraysCache(1)
    assert tq.explain(caches).layers[0].reason.startswith("recurrent state")
    assert "window already bounds" in tq.explain([window]).layers[0].reason


@pytest.mark.parametrize("make", [tq.apply, tq.make_prompt_cache, factory.caches_for])
def test_warnings_point_at_the_users_line(make, hooked):
    model = tiny_models.build("falcon_h1")
    with pytest.warns(UserWarning, match="recurrent state") as caught:
        make(model, "3")
    assert [warning.filename for warning in caught] == [__file__]


def test_uninstall_puts_a_models_own_maker_back(hooked):
    model = tiny_model()

    def own():
        return [host_cache.KVCache(), host_cache.RotatingKVCache(400)]

    object.__setattr__(model, "make_cache", own)
    for spec in ("3", "4"):
        tq.apply(model, spec)
        kinds = [type(cache) for cache in model.make_cache()]
        assert kinds == [tq.TurboQuantCache, tq.RotatingTurboQuantCache]
        assert [type(c) for c in stock_caches(model)] == [type(c) for c in own()]
    tq.uninstall()
    assert model.make_cache is own


@pytest.mark.parametrize(("window", "fits"), [(291, False), (292, True)])
def test_the_shortest_window_that_is_compressed(window, fits, hooked):
    model = tiny_model()
    if not fits:
        with pytest.raises(tq.errors.UnsupportedModelError, match="short for 292"):
            tq.make_prompt_cache(model, "3", max_kv_size=window)
        return
    caches = tq.make_prompt_cache(model, "3", max_kv_size=window)
    assert [cache.max_size for cache in caches] == [window] * 2


def test_a_window_counts_the_tokens_it_always_keeps(hooked):
    """The first 4 that ``max_kv_size`` keeps are more than this spec's sink."""
    model = tiny_model()
    with pytest.raises(tq.errors.UnsupportedModelError, match=r"71 .* short for 72"):
        tq.make_prompt_cache(model, "3,sink=0,window=4,page=32", max_kv_size=71)
    made = tq.make_prompt_cache(model, "3,sink=0,window=4,page=32", max_kv_size=72)
    logits = model(mx.arange(1, 121)[None] % 90, cache=made)
    assert mx.all(mx.isfinite(logits)).item()

"""Sliding windows: what mlx-lm's rotating cache would show, compressed."""

import mlx.core as mx
import pytest
from helpers import attend, relative_error
from mlx_lm.models.cache import BatchRotatingKVCache, RotatingKVCache
from test_batch import tiny_model

import mlx_turboquant as tq
from mlx_turboquant.errors import SpecError
from mlx_turboquant.integrations.stock import stock_caches

WINDOW = 80
SPEC = "8,window=4,sink=2,page=32"
#: Steps: all single tokens; prompts and steps past the window; a prompt far beyond it.
PLANS = ([1] * 150, [50, 30, 1, 1, 40, 3, *[1] * 40], [200, 1, 1, 100, 2, 1, 1])


def drawn(plan, seed=3, batch=1):
    keys = mx.random.split(mx.random.key(seed), 3)
    q = mx.random.normal((batch, 4, sum(plan), 64), key=keys[0])
    k, v = (mx.random.normal((batch, 2, sum(plan), 64), key=key) for key in keys[1:])
    return q, k, v


def run(cache, plan, tensors, window_size=None):
    """Outputs of every token, the mask made as models do."""
    outputs, start = [], 0
    for count in plan:
        part = (slice(None), slice(None), slice(start, start + count))
        q, k, v = (x[part] for x in tensors)
        mask = cache.make_mask(count, window_size=window_size)
        outputs.append(attend(q, *cache.update_and_fetch(k, v), 0.125, mask))
        mx.eval(outputs[-1], cache.state)
        start += count
    return mx.concatenate(outputs, axis=2)


@pytest.mark.parametrize("plan", PLANS, ids=["steps", "mixed", "long"])
@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("returns_arrays", [False, True])
def test_eight_bits_show_what_mlx_lm_shows(plan, keep, returns_arrays):
    tensors = drawn(plan)
    cache = tq.RotatingTurboQuantCache(
        SPEC, WINDOW, keep, returns_arrays=returns_arrays
    )
    got = run(cache, plan, tensors)
    want = run(RotatingKVCache(WINDOW, keep=keep), plan, tensors)
    assert 0 < relative_error(got, want) < 0.01
    assert cache.offset == sum(plan)


@pytest.mark.parametrize("plan", PLANS, ids=["steps", "mixed", "long"])
def test_a_models_smaller_window_is_kept_to(plan):
    tensors = drawn(plan)
    cache = tq.RotatingTurboQuantCache(SPEC, WINDOW)
    got = run(cache, plan, tensors, window_size=40)
    want = run(RotatingKVCache(WINDOW), plan, tensors, window_size=40)
    assert 0 < relative_error(got, want) < 0.01


def test_before_the_window_is_full_it_is_the_plain_cache():
    plan = [40, 1, 8, 14]
    tensors = drawn(plan)
    got = run(tq.RotatingTurboQuantCache(SPEC, WINDOW), plan, tensors)
    want = run(tq.TurboQuantCache(SPEC), plan, tensors)
    assert mx.array_equal(got, want).item()


def test_memory_is_bounded_and_whole_pages_are_forgotten():
    cache = tq.RotatingTurboQuantCache("3,window=4,sink=2,page=32", WINDOW)
    sizes = []
    tensors = drawn([700])
    for start in range(0, 700, 7):
        part = tuple(x[:, :, start : start + 7] for x in tensors)
        mask = cache.make_mask(7)
        attend(part[0], *cache.update_and_fetch(*part[1:]), 0.125, mask)
        mx.eval(cache.state)
        sizes.append(cache.nbytes)
        held = cache.sink_length + cache.packed_length + cache.recent_length
        assert min(cache.offset, WINDOW) <= held < WINDOW + 2 * 32 + 8
    assert max(sizes[30:]) <= max(sizes[:30]) < 73_000
    assert cache.sink_length == 0


def test_trim_only_before_tokens_left_as_in_mlx_lm():
    tensors = drawn([100])
    for count, trimmable in ((60, True), (80, False), (100, False)):
        cache = tq.RotatingTurboQuantCache(SPEC, WINDOW)
        stock = RotatingKVCache(WINDOW)
        for c in (cache, stock):
            run(c, [count], [x[:, :, :count] for x in tensors])
        assert cache.is_trimmable() == stock.is_trimmable() == trimmable
        assert cache.trim(5) == (5 if trimmable else 0)
        assert cache.offset == count - 5 * trimmable
        assert cache.size() == min(cache.offset, WINDOW)


@pytest.mark.parametrize("keep", [0, 4])
def test_saved_and_resumed_it_goes_on_bit_for_bit(keep):
    plan = [90, 1, 30, 1]
    q, k, v = drawn([*plan, 60, 1, 1])
    first = [x[:, :, : sum(plan)] for x in (q, k, v)]
    rest = [x[:, :, sum(plan) :] for x in (q, k, v)]
    cache = tq.RotatingTurboQuantCache("3,window=4,sink=2,page=32", WINDOW, keep)
    run(cache, plan, first)
    again = tq.RotatingTurboQuantCache.from_state(cache.state)
    assert (again.max_size, again.keep, again.offset) == (WINDOW, keep, sum(plan))
    got, want = (run(c, [60, 1, 1], rest) for c in (again, cache))
    assert mx.array_equal(got, want).item()


def test_a_batch_of_windows_is_its_rows():
    """Rows of different lengths, before, at and past the window."""
    lengths = (10, 70, 200)
    tensors = drawn([40, 1, 1], batch=3)
    rows = []
    for row, count in enumerate(lengths):
        rows.append(tq.RotatingTurboQuantCache(SPEC, WINDOW))
        run(rows[-1], [count], drawn([count], seed=row))
    batch = tq.RotatingTurboQuantCache.merge(rows)
    got = run(batch, [40, 1, 1], tensors)
    assert not batch.is_trimmable()
    for row, cache in enumerate(rows):
        own = [x[row : row + 1] for x in tensors]
        want = run(cache, [40, 1, 1], own)
        assert relative_error(got[row : row + 1], want) < 1e-6


def test_a_batch_agrees_with_mlx_lms(hooked):
    lengths = (10, 70, 200)
    plan, tensors = [1, 1, 1], drawn([3], batch=3)
    stock, ours = [], []
    for row, count in enumerate(lengths):
        stock.append(RotatingKVCache(WINDOW))
        ours.append(tq.RotatingTurboQuantCache(SPEC, WINDOW))
        for cache in (stock[-1], ours[-1]):
            run(cache, [count], drawn([count], seed=row))
    want = run(BatchRotatingKVCache.merge(stock), plan, tensors)
    got = run(tq.BatchTurboQuantCache.merge(ours), plan, tensors)
    assert 0 < relative_error(got, want) < 0.01


def test_a_window_too_short_is_refused_in_words():
    with pytest.raises(SpecError, match=r"64 tokens is too short .* at least 292"):
        tq.RotatingTurboQuantCache("3", 64)


def test_max_kv_size_makes_them(hooked):
    model = tiny_model()
    made = tq.make_prompt_cache(model, "3", max_kv_size=512)
    assert [type(c) for c in made] == [tq.RotatingTurboQuantCache] * 2
    assert (made[0].max_size, made[0].keep) == (512, 4)
    tq.apply(model, "3", max_kv_size=300)
    assert model.make_cache()[0].max_size == 300
    stock = stock_caches(model, 512)
    assert [(type(c), c.keep) for c in stock] == [(RotatingKVCache, 4)] * 2


def test_bits_are_chosen_for_windows_too(hooked):
    model = tiny_model()
    caches = tq.make_prompt_cache(model, "auto,window=4,page=32", max_kv_size=80)
    for start in range(0, 200, 20):
        logits = model(mx.arange(start, start + 20)[None], cache=caches)
        mx.eval(logits)
    assert mx.all(mx.isfinite(logits)).item()
    assert not any(cache.spec.adaptive for cache in caches)
    assert all(cache.packed_length < 80 + 32 for cache in caches)


def test_kept_tokens_are_seen_by_all_of_a_long_step_if_asked_for():
    """As mlx-vlm's caches show them, and through a file."""
    kv = mx.random.normal((1, 2, 100, 16))
    for sees_kept in (False, True):
        spec = "8,page=32,window=4,sink=4"
        cache = tq.RotatingTurboQuantCache(spec, 80, keep=4, sees_kept=sees_kept)
        attend(kv, *cache.update_and_fetch(kv, kv), 0.25)
        for made in (cache, tq.RotatingTurboQuantCache.from_state(cache.state)):
            mask = made.make_mask(20)
            assert mask.shape == (20, 79 + 20)
            assert mask.sum(axis=1).tolist() == [80] * 20
            assert mx.all(mask[:, :4]).item() == sees_kept

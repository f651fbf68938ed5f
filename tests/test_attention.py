from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from cases import each_dim, each_spec
from helpers import relative_error, softmax_attention, stored

import mlx_turboquant as tq
from mlx_turboquant.backends import reference
from mlx_turboquant.segments import CompressedTokens

SCALE = 0.2


def filled(spec, length, heads=2, k_dim=64, v_dim=64, dtype=mx.float32, offset=0.0):
    """A cache and the keys and values it holds, as attention should see them."""
    k = mx.random.normal((1, heads, length, k_dim))
    k = (k + offset * mx.random.normal((1, heads, 1, k_dim))).astype(dtype)
    v = mx.random.normal((1, heads, length, v_dim)).astype(dtype)
    cache = tq.TurboQuantCache(spec)
    for start, stop in pairwise((*range(0, length, 150), length - 1, length)):
        cache.update_and_fetch(k[:, :, start:stop], v[:, :, start:stop])
    assert cache.packed_length
    return cache, k, v


MASKS = {
    "none": lambda n, t: None,
    "causal": lambda n, t: "causal",
    "bool": lambda n, t: mx.random.uniform(shape=(n, t)) > 0.3,
    "additive": lambda n, t: mx.random.normal((1, 1, n, t)),
    "per head": lambda n, t: mx.random.normal((1, 4, n, t)),
}


@each_spec
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", [1, 5, 40])
def test_equals_float64_attention_over_what_is_stored(spec, mask, n):
    cache, _, _ = filled(spec, 300)
    keys, values = cache.keys_and_values()
    q = mx.random.normal((1, 4, n, 64))
    m = MASKS[mask](n, 300)
    got = tq.attend(q, keys, values, SCALE, m)
    want = softmax_attention(q, *map(stored, cache.keys_and_values()), SCALE, m)
    assert relative_error(got, want) < 1e-5


@each_dim
def test_every_dim(dim):
    cache, _, _ = filled("k4v3", 250, k_dim=dim, v_dim=dim)
    q = mx.random.normal((1, 2, 3, dim))
    got = tq.attend(q, *cache.keys_and_values(), SCALE, "causal")
    want = softmax_attention(q, *map(stored, cache.keys_and_values()), SCALE, "causal")
    assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize(("heads", "group"), [(1, 8), (2, 3), (4, 1)])
def test_grouped_queries_equal_repeated_heads(heads, group):
    cache, k, v = filled("k4v4", 300, heads=heads, k_dim=64, v_dim=32)
    q = mx.random.normal((1, heads * group, 2, 64))
    got = tq.attend(q, *cache.keys_and_values(), SCALE)
    wide = tq.TurboQuantCache("k4v4")
    for part in (slice(0, 299), slice(299, 300)):
        k_part, v_part = k[:, :, part], v[:, :, part]
        wide.update_and_fetch(
            mx.repeat(k_part, group, axis=1), mx.repeat(v_part, group, axis=1)
        )
    want = tq.attend(q, *wide.keys_and_values(), SCALE)
    assert got.shape == (1, heads * group, 2, 32)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_learned_sinks_are_exact_in_spite_of_centring(n, offset):
    cache, _, _ = filled("k5v5", 300, offset=offset)
    q = mx.random.normal((1, 4, n, 64)) * 0.3
    sinks = mx.array([0.0, 2.0, -1.0, 4.0])
    got = tq.attend(q, *cache.keys_and_values(), SCALE, "causal", sinks)
    want = softmax_attention(
        q, *map(stored, cache.keys_and_values()), SCALE, "causal", sinks
    )
    assert relative_error(got, want) < 2e-5
    without = softmax_attention(
        q, *map(stored, cache.keys_and_values()), SCALE, "causal"
    )
    assert relative_error(got, without) > 0.01


def test_error_falls_with_every_bit():
    errors = []
    for bits in range(1, 9):
        mx.random.seed(1)
        cache, k, v = filled(f"k{bits}v{bits}", 400)
        q = mx.random.normal((1, 4, 4, 64))
        got = tq.attend(q, *cache.keys_and_values(), SCALE)
        errors.append(relative_error(got, softmax_attention(q, k, v, SCALE)))
    assert all(low < 0.75 * high for high, low in pairwise(errors))
    assert errors[0] > 0.1 > 0.01 > errors[-1] > 0


@pytest.mark.parametrize("offset", [1.0, 3.0, 10.0, 30.0])
def test_a_large_key_mean_costs_nothing_when_centred(offset):
    """The mean is shared by every logit of a softmax, so it may go."""

    def error(spec, shift):
        mx.random.seed(2)
        cache, k, v = filled(spec, 500, offset=shift)
        q = mx.random.normal((1, 4, 8, 64))
        got = tq.attend(q, *cache.keys_and_values(), SCALE)
        return relative_error(got, softmax_attention(q, k, v, SCALE))

    plain = error("k3v8", 0.0)
    assert error("k3v8", offset) < 1.2 * plain
    if offset >= 3:
        assert error("k3v8,center=off", offset) > 2 * plain


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_models(dtype):
    """No worse than twice what plain attention loses in that dtype."""
    cache, _, _ = filled("k4v4", 300, dtype=dtype)
    q = mx.random.normal((1, 4, 3, 64)).astype(dtype)
    k, v = map(stored, cache.keys_and_values())
    want = softmax_attention(q.astype(mx.float32), k, v, SCALE)
    got = tq.attend(q, *cache.keys_and_values(), SCALE)
    assert got.dtype == dtype
    plain = mx.fast.scaled_dot_product_attention(
        q, k.astype(dtype), v.astype(dtype), scale=SCALE
    )
    floor = relative_error(plain.astype(mx.float32), want)
    assert relative_error(got.astype(mx.float32), want) < 2 * floor


def test_slices_of_heads_change_nothing(monkeypatch):
    cache, _, _ = filled("k4v4", 300, heads=4)
    q = mx.random.normal((1, 8, 20, 64))
    mask = mx.random.normal((1, 8, 20, 300))
    sides = cache.keys_and_values()
    whole = tq.attend(q, *sides, SCALE, mask, mx.zeros(8))
    slices = reference.Reference().slices_of_heads
    assert slices(*sides, q.dtype) == [slice(0, 4)]
    monkeypatch.setattr(reference, "SLICE_BYTES", 1)
    assert slices(*sides, q.dtype) == [slice(i, i + 1) for i in range(4)]
    sliced = tq.attend(q, *sides, SCALE, mask, mx.zeros(8))
    assert relative_error(sliced, whole) < 1e-6


def test_plain_arrays_pass_through_bit_for_bit():
    q, k, v = (mx.random.normal((1, 2, 9, 32)) for _ in range(3))
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")
    assert mx.array_equal(tq.attend(q, k, v, SCALE, "causal"), want).item()


def test_misfits_are_refused_with_their_shapes():
    cache, _, _ = filled("3", 200)
    keys, values = cache.keys_and_values()
    for shape in ((1, 3, 1, 64), (2, 2, 1, 64), (1, 2, 1, 32)):
        with pytest.raises(ValueError, match="do not fit keys"):
            tq.attend(mx.zeros(shape), keys, values, SCALE)
    with pytest.raises(ValueError, match="'diagonal' is unknown"):
        tq.attend(mx.zeros((1, 2, 1, 64)), keys, values, SCALE, "diagonal")


def test_bounded_prefill_memory(monkeypatch):
    """At 8k tokens: the cache, one slice, and what stock needs besides its cache."""
    from mlx_lm.models.cache import KVCache

    layers, heads, dim, chunk, total = 8, 2, 128, 256, 8192
    per_element = reference.Reference().transient_bytes(mx.float32)
    one_head = total * 2 * dim * per_element
    monkeypatch.setattr(reference, "SLICE_BYTES", one_head)

    def peak(caches, attend):
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        q = mx.random.normal((1, heads, chunk, dim))
        for start in range(0, total, chunk):
            for layer, cache in enumerate(caches):
                kv = mx.random.normal((1, heads, chunk, dim), key=mx.random.key(layer))
                fetched = cache.update_and_fetch(kv, kv)
                if start + chunk == total:  # the last chunk sees everything
                    mx.eval(attend(q, *fetched))
                mx.eval(cache.state)
        return mx.get_peak_memory() - before

    def stock_attend(q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal")

    stock = [KVCache() for _ in range(layers)]
    stock_peak = peak(stock, stock_attend)
    besides = stock_peak - sum(cache.nbytes for cache in stock)
    del stock
    ours = [tq.TurboQuantCache("3") for _ in range(layers)]
    ours_peak = peak(ours, lambda q, k, v: tq.attend(q, k, v, 1.0, "causal"))
    held = sum(cache.nbytes for cache in ours)
    assert all(isinstance(c.keys_and_values()[0], CompressedTokens) for c in ours)
    print(f"peak MB: stock {stock_peak / 1e6:.0f}, ours {ours_peak / 1e6:.0f}")
    assert ours_peak < 0.6 * stock_peak
    assert ours_peak < held + one_head + besides
    assert np.isfinite(besides)
    assert besides > 0

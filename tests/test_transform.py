"""Equalised channels, page means, and the calibration that fixes them."""

import mlx.core as mx
import pytest
from helpers import attend, relative_error, softmax_attention, stored

import mlx_turboquant as tq
from mlx_turboquant.cache.calibration import Calibration
from mlx_turboquant.page_table import PageTable
from mlx_turboquant.pages import PagePool
from mlx_turboquant.quantizer import PageMeans
from mlx_turboquant.rotation import rotation_for
from mlx_turboquant.transform import ChannelTransform

SCALE = 0.125


def gains(heads, dim, spread=1.0, batch=1):
    return mx.exp(spread * mx.random.normal((batch, heads, 1, dim)))


@pytest.mark.parametrize("dim", [33, 64, 128])
def test_a_basis_keeps_dot_products_and_is_undone(dim):
    basis = ChannelTransform(rotation_for(dim, 1), gains(2, dim, batch=3))
    k, q = mx.random.normal((3, 2, 7, dim)), mx.random.normal((3, 6, 7, dim))
    got = mx.sum(basis.encode_query(q) * mx.repeat(basis.encode(k), 3, axis=1), axis=-1)
    want = mx.sum(q * mx.repeat(k, 3, axis=1), axis=-1)
    assert relative_error(got, want) < 1e-5
    assert relative_error(basis.decode(basis.encode(k)), k) < 1e-5
    one = basis.of_heads(slice(1, 2))
    assert relative_error(one.encode(k[:, 1:]), basis.encode(k)[:, 1:]) < 1e-6


def test_signs_of_kernels_are_the_basis():
    basis = ChannelTransform(rotation_for(64, 1), gains(2, 64))
    x = mx.random.normal((1, 2, 5, 64))
    x_rot = mx.hadamard_transform(x * basis.signs_over_gains, scale=1 / 8)
    assert relative_error(x_rot, basis.encode(x)) < 1e-6
    assert (
        relative_error(
            mx.hadamard_transform(x_rot, scale=1 / 8) * basis.signs_times_gains, x
        )
        < 1e-6
    )


def test_page_means_by_token():
    rows = mx.arange(12.0).reshape(1, 1, 12, 1).astype(mx.float16)
    table = PageTable(PagePool(16))
    means = PageMeans(16, table)
    means.append(rows[:, :, :3])
    got = means.of_tokens(20, 28)[0, 0, :, 0].tolist()
    assert got == [1.0] * 12 + [2.0] * 16
    assert means.of_tokens(16, 16)[0, 0, :, 0].tolist() == [1.0] * 16
    means.keep(17)
    assert means.count == 2
    table.drop([0])
    assert means.of_tokens(0, 3)[0, 0, :, 0].tolist() == [1.0] * 3


def calibrated(keys, values, q, **fields):
    cache = tq.TurboQuantCache(tq.CacheSpec.parse("k3v3,sink=0,window=0", **fields))
    attend(q, *cache.update_and_fetch(keys, values), SCALE, "causal")
    return cache


def data(length=512, heads=2, dim=64):
    shape = (1, heads, length, dim)
    k = mx.random.normal(shape) * gains(heads, dim, 0.5)
    v = mx.random.normal(shape) * gains(heads, dim, 0.5)
    return k, v, mx.random.normal((1, 2 * heads, length, dim))


def attention_error(cache, q, k, v):
    got = attend(q[:, :, -4:], *cache.keys_and_values(), SCALE)
    return relative_error(got, softmax_attention(q[:, :, -4:], k, v, SCALE))


def test_gains_of_the_model_change_no_code():
    """Keys times a, queries over a, values times b: the same words."""
    k, v, q = data()
    a, b = gains(2, 64, 1.5), gains(2, 64, 1.5)
    plain = calibrated(k, v, q)
    hard = calibrated(k * a, v * b, q / mx.repeat(a, 2, axis=1))
    for side in ("keys", "values"):
        words = [c.state[f"packed:{side}_words"] for c in (plain, hard)]
        assert mx.mean(words[0] == words[1]).item() > 0.99
    assert attention_error(hard, q / mx.repeat(a, 2, axis=1), k * a, v * b) == (
        pytest.approx(attention_error(plain, q, k, v), rel=0.3)
    )
    loose = calibrated(k * a, v, q / mx.repeat(a, 2, axis=1), equalize=False)
    bad = attention_error(loose, q / mx.repeat(a, 2, axis=1), k * a, v)
    assert bad > 2 * attention_error(plain, q, k, v)


def test_gains_are_the_cauchy_schwarz_optimum():
    """Any other gains predict, and give, more error of the logits."""
    k, _, q = data()
    watch = Calibration(0, 512)
    watch.observe(q, SCALE, 2, 512)
    best = watch.key_gains(k, centers=False)
    cost = watch.logit_variance(k, best).item()
    for other in (None, mx.ones_like(best), best * gains(2, 64, 0.3), best**2):
        assert watch.logit_variance(k, other).item() > 1.02 * cost


def test_logit_variance_predicts_the_error_of_logits():
    k, v, q = data()
    cache = calibrated(k, v, q, center="off")
    keys, _ = cache.keys_and_values()
    wrong = stored(keys)[:, :, : cache.packed_length] - k[:, :, : cache.packed_length]
    error = SCALE * q.reshape(1, 2, 2, 512, 64) @ wrong[:, :, None].swapaxes(-1, -2)
    watch = Calibration(0, 512)
    watch.observe(q, SCALE, 2, 512)
    variance = watch.logit_variance(k, keys.quantizer.transform.gains).item()
    mse = keys.quantizer.codec.codebook.mse
    predicted = mse * 0.93 * variance  # 7% by scale search
    assert mx.var(error).item() == pytest.approx(predicted, rel=0.1)


def test_queries_seen_twice_or_with_a_gap_do_not_count():
    q = mx.random.normal((1, 4, 8, 16))
    watch = Calibration(2, 20)
    watch.observe(q, 1.0, 2, 8)
    watch.observe(q, 1.0, 2, 8)  # a layer that shares the cache
    watch.observe(q, 1.0, 2, 17)  # one token was never seen
    assert watch.state["squares"].shape == (1, 2, 8, 16)
    assert not watch.saw_whole_page
    watch.trim(5)
    for offset in (13, 21, 29):
        watch.observe(q, 1.0, 2, offset)
    assert watch.saw_whole_page
    assert watch.state["squares"].shape == (1, 2, 22, 16)


def test_queries_of_one_step_are_those_of_many():
    """The whole page at once, its squares, what a trim leaves of it."""
    k, q = mx.random.normal((1, 2, 20, 16)), mx.random.normal((1, 4, 30, 16))
    many, one = Calibration(2, 20), Calibration(2, 20)
    for first in range(0, 30, 5):
        many.observe(q[:, :, first : first + 5], 1.0, 2, first + 5)
    one.observe(q, 1.0, 2, 30)
    assert one.saw_whole_page
    assert mx.allclose(one.key_gains(k, True), many.key_gains(k, True), rtol=1e-5)
    for watch in (one, many):
        watch.trim(17)
        assert not watch.saw_whole_page
    assert one.state["squares"].shape == (1, 2, 17, 16)
    assert mx.allclose(one.state["squares"], many.state["squares"])
    for watch in (one, many):
        watch.observe(-q[:, :, :5], 1.0, 2, 22)
    assert one.saw_whole_page
    assert mx.allclose(one.key_gains(k, True), many.key_gains(k, True), rtol=1e-5)


def test_channels_of_zeros_stay_finite():
    k, v, q = data()
    dead = mx.arange(64) < 10
    k, v, q = (mx.where(dead, 0.0, x) for x in (k, v, q))
    cache = calibrated(k, v, q)
    assert attention_error(cache, q, k, v) < 0.5
    assert mx.all(mx.isfinite(cache.state["gains:keys"])).item()


@pytest.mark.parametrize("offset", [3.0, 30.0])
def test_means_that_drift_cost_nothing_with_page_means(offset):
    """A mean that turns slowly, as keys' do under RoPE."""
    turn = mx.arange(512)[:, None] * 0.003
    drift = offset * mx.concatenate([mx.cos(turn), mx.sin(turn)] * 32, axis=1)

    def error(center, shift):
        mx.random.seed(4)
        k, v, q = data()
        k = k + shift
        return attention_error(calibrated(k, v, q, center=center), q, k, v)

    plain = error("page", 0.0)
    assert error("page", drift) < (1.5 if offset == 3 else 6) * plain
    assert error("page", drift) < 0.7 * error("off", drift)

"""The softmax of the CPU backend against MLX's."""

import mlx.core as mx
import pytest
from helpers import relative_error

from mlx_turboquant.backends.exponential import softmax_of_parts, softmax_parts


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
def test_it_is_mlx_softmax(spread):
    logits = mx.random.normal((2, 3, 2, 1001)) * spread
    weights, total = softmax_parts(logits)
    want = mx.softmax(logits, axis=-1, precise=True)
    assert relative_error(weights / total, want) < 1e-6


def test_masked_tokens_weigh_nothing():
    logits = mx.array([[[[0.0, -mx.inf, -1e9, -200.0, 1.0]]]])
    weights, total = softmax_parts(logits)
    assert weights[0, 0, 0, 1:4].tolist() == [0, 0, 0]
    assert abs((weights[..., 0] / total[..., 0]).item() - 0.268941) < 1e-6


@pytest.mark.parametrize("learned", [-50.0, 0.0, 50.0])
def test_learned_sinks_only_take_weight(learned):
    logits, sinks = mx.random.normal((1, 3, 2, 50)), mx.full((3,), learned)
    weights, total = softmax_parts(logits, sinks)
    column = mx.full((1, 3, 2, 1), learned)
    joined = mx.concatenate([column, logits], axis=-1)
    want = mx.softmax(joined, axis=-1, precise=True)[..., 1:]
    assert mx.allclose(weights / total, want, rtol=1e-5, atol=1e-30).item()


@pytest.mark.parametrize("sinks", [None, mx.array([3.0, -3.0])])
def test_logits_in_several_arrays_share_a_softmax(sinks):
    logits = mx.random.normal((1, 2, 3, 50)) * 10
    pieces = [logits[..., :7], logits[..., 7:8], logits[..., 8:]]
    weights, total = softmax_of_parts(pieces, sinks)
    want, want_total = softmax_parts(logits, sinks)
    assert mx.array_equal(mx.concatenate(weights, axis=-1), want).item()
    assert mx.allclose(total, want_total, rtol=1e-6).item()

"""Bits by layer: the rule, its limits, and how layers wait for one another."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from helpers import attend
from hypothesis import given
from hypothesis import strategies as st

import mlx_turboquant as tq
from mlx_turboquant.cache import bit_allocation
from mlx_turboquant.cache.bit_allocation import TARGETS, BitAllocator, LayerSlot
from mlx_turboquant.codecs.trellis_levels import FORMULAS
from mlx_turboquant.polynomial import polynomial_codebook

DIMS = (64, 64)


def spec(**fields):
    return tq.CacheSpec.parse("auto", **fields)


def codecs(readings, spec):
    """Codecs of (keys, values) per layer, all of one shape."""
    return bit_allocation.choose(readings, [(2, *DIMS)] * len(readings), spec)


def choose(readings, spec):
    """Bits of (keys, values) per layer."""
    return [(k.bits, v.bits) for k, v in codecs(readings, spec)]


def mean_bits(chosen):
    return np.mean(chosen)


def cost(readings, chosen):
    return np.mean(
        [
            reach
            * (a * polynomial_codebook(64, k).mse + polynomial_codebook(64, v).mse)
            / 2
            for (reach, a), (k, v) in zip(readings, chosen, strict=True)
        ]
    )


reading = st.tuples(st.floats(1e-4, 1), st.floats(0.01, 100))
readings = st.lists(reading, min_size=1, max_size=12)


@given(readings, st.floats(2, 8))
def test_a_budget_is_met_and_not_exceeded(readings, budget):
    chosen = choose(readings, spec(budget=budget))
    assert mean_bits(chosen) <= budget + 1e-9
    # Less than one step of the widest kind is left over.
    assert mean_bits(chosen) > budget - 2 / (2 * len(readings))


@given(readings, st.sampled_from(sorted(TARGETS)))
def test_a_quality_bounds_the_predicted_cost(readings, quality):
    chosen = choose(readings, spec(quality=quality))
    most = [(8, 8)] * len(readings)
    assert cost(readings, chosen) <= max(TARGETS[quality], cost(readings, most))


@given(readings)
def test_more_budget_is_never_worse_and_flatter_than_uniform(readings):
    costs = [cost(readings, choose(readings, spec(budget=b))) for b in (2, 3, 4, 5)]
    assert costs == sorted(costs, reverse=True)
    for bits, got in zip((2, 3, 4, 5), costs, strict=True):
        assert got <= cost(readings, [(bits, bits)] * len(readings)) + 1e-12


@given(readings, st.floats(2, 8))
def test_with_the_trellis_the_predicted_cost_is_lower(readings, budget):
    """It has less error than scalars up to 4 bits; above, scalars take over."""
    coded = tq.CacheSpec.parse("auto,codec=trellis", budget=budget)
    chosen = codecs(readings, coded)
    for side in (side for pair in chosen for side in pair):
        assert side.name == ("trellis" if side.bits <= 4 else "turboquant")
    bits = [(k.bits, v.bits) for k, v in chosen]
    assert mean_bits(bits) <= budget + 1e-9

    def predicted(pairs):
        error = {
            "trellis": lambda bits: FORMULAS[bits].mse,
            "turboquant": lambda b: polynomial_codebook(64, b).mse,
        }
        return sum(
            reach * (a * error[k.name](k.bits) + error[v.name](v.bits))
            for (reach, a), (k, v) in zip(readings, pairs, strict=True)
        )

    scalar = codecs(readings, spec(budget=budget))
    assert predicted(chosen) < predicted(scalar) * (1 if budget < 5 else 1.3)


def test_bits_follow_the_variance():
    """A layer whose logits feel errors more gets more bits: early boost, by itself."""
    some = [(0.1, a) for a in (20.0, 1.0, 1.0, 0.05)]
    chosen = choose(some, spec(budget=3.5))
    keys = [k for k, _ in chosen]
    assert keys == sorted(keys, reverse=True)
    assert keys[0] > keys[1] > keys[3]
    far = choose([(0.2, 1.0), (0.001, 1.0)], spec(budget=4))
    assert min(far[0]) > max(far[1])  # whose attention is near needs few bits
    order = ["small", "balanced", "lossless"]
    bits = [mean_bits(choose([(0.1, 1.0)] * 4, spec(quality=q))) for q in order]
    assert bits[0] < bits[1] < bits[2]


def step(cache, tokens, seed, loud=1.0):
    k, v, q = (
        mx.random.normal((1, heads, tokens, 64), key=mx.random.key(seed + i))
        for i, heads in enumerate((2, 2, 4))
    )
    return attend(q * loud, *cache.update_and_fetch(k, v), 0.125, "causal")


def layers(text, count=3):
    shared = BitAllocator(tq.CacheSpec.parse(text), [None] * count)
    return [tq.TurboQuantCache(shared.spec, LayerSlot(shared, i)) for i in range(count)]


@pytest.mark.parametrize("first", [1, 400])
def test_layers_wait_for_one_another_and_differ(first):
    caches = layers("auto,budget=3.25")
    for at in range(0, 400, first):
        for index, cache in enumerate(caches):
            mx.eval(step(cache, first, 10 * at + index, loud=(0.1, 1.0, 5.0)[index]))
    for index, cache in enumerate(caches):
        mx.eval(step(cache, 1, 5000 + index))
        # A prompt that ends in a short text goes on to its last tile.
        assert cache.packed_length == (352 if first == 400 else 256)
        assert not cache.spec.adaptive
    bits = [(c.spec.keys.bits, c.spec.values.bits) for c in caches]
    assert np.mean(bits) == pytest.approx(3.25, abs=0.1)
    assert bits[0][0] < bits[1][0] < bits[2][0]
    table = str(tq.explain(caches))
    assert all(f"k{k}v{v}" in table for k, v in bits)
    assert "x1" in tq.explain(caches).summary()


def test_the_choice_is_saved_with_the_cache():
    caches = layers("auto,quality=balanced")
    for _ in range(2):
        for index, cache in enumerate(caches):
            mx.eval(step(cache, 300, index, loud=3.0**index))
    for cache in caches:
        again = tq.TurboQuantCache.from_state(cache.state)
        assert again.spec == cache.spec
        assert "auto" not in str(again.spec)
        mx.eval(step(again, 5, 77))


def test_copies_of_one_text_choose_together():
    """As in a batch, whose layers are copied one by one before anything is read."""
    caches = [copy.deepcopy(cache) for cache in layers("auto,budget=4")]
    for at in range(2):
        for index, cache in enumerate(caches):
            mx.eval(step(cache, 300, at * 9 + index, loud=4.0**index))
    bits = [(c.spec.keys.bits, c.spec.values.bits) for c in caches]
    assert len({k for k, _ in bits}) > 1
    assert np.mean(bits) <= 4


def test_a_layer_that_no_query_ever_reads_does_not_block_the_others():
    caches = layers("auto,budget=3")
    for at in range(3):
        for index, cache in enumerate(caches[:2]):
            mx.eval(step(cache, 200, at * 9 + index))
    assert caches[0].packed_length > 0
    assert caches[1].packed_length > 0


def test_one_cache_alone_meets_its_budget():
    cache = tq.TurboQuantCache("auto,budget=3.5")
    for at in range(2):
        mx.eval(step(cache, 300, at))
    assert (cache.spec.keys.bits + cache.spec.values.bits) / 2 <= 3.5


def test_a_budget_counts_layers_by_their_size():
    """A layer of eight times the elements takes eight times the bits of the budget."""
    shapes = [(1, 64, 64), (8, 64, 64)]
    chosen = bit_allocation.choose([(0.1, 1.0)] * 2, shapes, spec(budget=3))
    bits = [[side.bits for side in layer] for layer in chosen]
    used = sum(heads * sum(b) for (heads, _, _), b in zip(shapes, bits, strict=True))
    assert used / (2 * 9) <= 3
    # Equal sensitivity: the small layer is where bits are cheap.
    assert min(bits[0]) >= max(bits[1])
    assert sum(bits[0]) > sum(bits[1])

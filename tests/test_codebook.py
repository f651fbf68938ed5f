import math

import mlx.core as mx
import numpy as np
import pytest
from cases import each_bits
from solve_codebooks import BITS, DIMS

from mlx_turboquant.codebook import lloyd_max, solve_interval, solve_sphere

# arXiv 2504.19874 gives the density; these are its exact Lloyd-Max distortions.
DISTORTION = {
    64: (0.3584, 0.1145, 0.0334, 0.00913),
    128: (0.3609, 0.1160, 0.0340, 0.00931),
    256: (0.3621, 0.1167, 0.0343, 0.00941),
}
# At dim 128, by 20,000 plain Lloyd iterations on another grid.
LEVELS = {
    2: (0.45245, 1.50519),
    3: (0.24442, 0.75333, 1.33660, 2.13147),
    4: (0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04592, 2.68886),
}


@pytest.mark.parametrize("dim", DISTORTION)
def test_distortion_is_the_published_one(dim):
    for bits, want in enumerate(DISTORTION[dim], start=1):
        assert lloyd_max(dim, bits).mse == pytest.approx(want, rel=3e-3)


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_at_128_are_pinned(bits):
    got = np.array(lloyd_max(128, bits).levels)[2 ** (bits - 1) :]
    assert np.allclose(got, LEVELS[bits], atol=2e-5)


def test_one_bit_level_is_the_mean_magnitude():
    """E|x| = sqrt(d) * Gamma(d/2) / (sqrt(pi) * Gamma((d+1)/2))."""
    for dim in (32, 80, 128):
        log_ratio = math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)
        want = math.sqrt(dim / math.pi) * math.exp(log_ratio)
        assert lloyd_max(dim, 1).levels[1].item() == pytest.approx(want, abs=1e-6)


@each_bits
def test_distortion_matches_samples_of_a_rotated_vector(bits):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(4000, 64))
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    book = lloyd_max(64, bits)
    levels = np.array(book.levels)
    got = levels[np.array(book.nearest(mx.array(x.astype(np.float32))))]
    assert ((x - got) ** 2).mean() == pytest.approx(book.mse, rel=0.03)


@each_bits
def test_levels_are_the_centroids_of_their_cells(bits):
    """The Lloyd condition, by an integration the solver does not use."""
    dim = 80
    t = np.linspace(-1, 1, 2_000_001)
    x, pdf = t * np.sqrt(dim), (1 - t * t) ** ((dim - 3) / 2)
    book = lloyd_max(dim, bits)
    cell = np.searchsorted(np.array(book.boundaries, dtype=np.float64), x)
    mass = np.bincount(cell, pdf, 2**bits)
    centroid = np.bincount(cell, pdf * x, 2**bits) / mass
    assert np.abs(centroid - np.array(book.levels)).max() < 2e-4


def test_shipped_table_is_what_the_solver_finds():
    for dim in (32, 128, 576):
        assert dim in DIMS
        for bits in BITS:
            shipped = np.array(lloyd_max(dim, bits).levels)[2 ** (bits - 1) :]
            assert np.allclose(shipped, solve_sphere(dim, bits), atol=2e-6)


def test_dims_outside_the_table_are_solved():
    assert 100 not in DIMS
    assert lloyd_max(96, 3).mse < lloyd_max(100, 3).mse < lloyd_max(112, 3).mse


@each_bits
def test_nearest_is_nearest_and_ties_go_up(bits):
    book = lloyd_max(64, bits)
    x = mx.random.normal((1000,)) * 1.5
    brute = mx.argmin(mx.abs(x[:, None] - book.levels), axis=-1)
    assert mx.array_equal(book.nearest(x), brute).item()
    assert book.nearest(book.boundaries).tolist() == list(range(1, 2**bits))


def test_levels_of_a_uniform_density_are_uniform():
    levels, codebook = solve_interval(np.ones_like, 1.0, 4)
    assert np.allclose(levels, [0.125, 0.375, 0.625, 0.875], atol=1e-6)
    assert codebook.mse == pytest.approx(1 / 12 / 16, rel=1e-4)
    assert codebook.nearest(mx.array([0.0, 0.3, 0.99])).tolist() == [0, 1, 3]

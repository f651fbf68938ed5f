import mlx.core as mx
import numpy as np
import pytest
from cases import each_dim

from mlx_turboquant.errors import UnsupportedError
from mlx_turboquant.rotation import rotation_for, rotation_signs

UNSAFE = (72, 144, 288, 576, 80, 112, 160)


@each_dim
def test_inverse_undoes_forward_and_norms_are_kept(dim):
    rotation = rotation_for(dim, seed=3)
    x = mx.random.normal((5, dim))
    y = rotation.forward(x)
    assert mx.abs(rotation.inverse(y) - x).max().item() < 5e-6
    ratio = mx.linalg.norm(y, axis=-1) / mx.linalg.norm(x, axis=-1)
    assert mx.abs(ratio - 1).max().item() < 5e-6


@each_dim
def test_matches_its_definition_in_float64(dim):
    """signs, then Sylvester's Hadamard matrix or the orthonormal DCT-II."""
    rotation = rotation_for(dim, seed=1)
    x = np.random.default_rng(0).normal(size=(4, dim))
    signed = x * rotation_signs(dim, 1)
    if rotation.kind == "hadamard" and dim & (dim - 1) == 0:
        matrix = np.ones((1, 1))
        while len(matrix) < dim:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        matrix = matrix / np.sqrt(dim)
    elif rotation.kind == "dct":
        n, k = np.arange(dim), np.arange(dim)[:, None]
        matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * dim)) * np.sqrt(2 / dim)
        matrix[0] /= np.sqrt(2)
    else:  # 12 * 2**k: MLX's own table; the law above is what we rely on
        return
    got = np.array(rotation.forward(mx.array(x.astype(np.float32))))
    assert np.abs(got - signed @ matrix.T).max() < 1e-5


@pytest.mark.parametrize("dim", UNSAFE)
def test_dims_where_mlx_hadamard_is_unsafe_never_use_it(dim):
    assert rotation_for(dim, 0).kind == "dct"


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 256])
def test_fourth_moment_of_rotated_coordinates(dim):
    """Mixing as theory has it: 3 - c * sum(x^4) / |x|^4, c = 2, or 3/2 for cosines."""
    rotation = rotation_for(dim, 0)
    x = np.random.default_rng(1).normal(size=(4000, dim)) ** 3
    x *= np.linspace(0.2, 3, dim)
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    y = np.array(rotation.forward(mx.array(x.astype(np.float32))))
    peak = (x**4).mean(-1).mean() / dim
    want = 3 - (2 if rotation.kind == "hadamard" else 1.5) * peak
    assert (x**4).mean() > 10
    assert (y**4).mean() == pytest.approx(want, abs=0.06)


def test_seeds_differ_and_repeat():
    assert rotation_signs(128, 0) != rotation_signs(128, 1)
    assert rotation_signs(64, 7) == rotation_signs(128, 7)[:64]


def test_signs_are_the_low_bits_of_splitmix64():
    """Published outputs of SplitMix64 for seed 0."""
    outputs = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert rotation_signs(3, 0) == [1 - 2 * (z & 1) for z in outputs]


def test_golden_signs_never_change():
    """Fails when the sign algorithm changes; raise FORMAT_VERSION then."""

    def text(seed):
        return "".join("+" if s > 0 else "-" for s in rotation_signs(32, seed))

    assert text(0) == "-+-+-+-+-+-+-----+++--++--++++--"
    assert text(1) == "+---+-+++-+-++++---+++---+-+++-+"


@pytest.mark.parametrize("dim", [0, 4, 1025, 4096])
def test_dims_out_of_reach_are_refused_in_words(dim):
    with pytest.raises(UnsupportedError, match=rf"head_dim {dim} is outside 8\.\.1024"):
        rotation_for(dim, 0)

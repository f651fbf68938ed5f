"""Laws that every codec obeys, and what each one's error is."""

import math
from itertools import pairwise

import mlx.core as mx
import pytest
from cases import each_codec
from codec_tools import made, mse, vectors

import mlx_turboquant as tq
from mlx_turboquant.codecs import codec_info
from mlx_turboquant.codecs.kernel_format import ANGLES, PAIRS, POLYNOMIAL
from mlx_turboquant.errors import UnsupportedError


def sides(name):
    return ("keys",) if codec_info(name).keys_only else ("keys", "values")


@each_codec
def test_bits_are_counted_whole_and_arrays_named(name):
    widths = codec_info(name).widths
    for bits in (widths[0], widths[-1]):
        for dim in (64, 96, 128):
            for side in sides(name):
                codec = made(name, bits, dim, side)
                codes = codec.encode(vectors(dim, 5))
                assert tuple(codes.arrays) == codec.arrays
                assert 8 * codes.nbytes == 10 * codec.bits_per_vector
                assert codec.bits_per_vector >= bits * dim * 0.99


@each_codec
def test_a_tokens_codes_depend_on_that_token_alone(name):
    x = vectors(64, 40)
    codec = made(name, dim=64, side="keys")
    whole = codec.encode(x)
    for part in (slice(0, 1), slice(7, 30)):
        alone = codec.encode(x[:, :, part])
        for key, array in alone.arrays.items():
            assert mx.array_equal(array, whole.arrays[key][:, :, part]).item()


@each_codec
def test_some_heads_and_some_tokens(name):
    codec = made(name, dim=64, side="keys")
    codes = codec.encode(vectors(64, 20))
    whole = codec.decode(codes, mx.float32)
    assert whole.shape == (1, 2, 20, 64)
    fewer = tq.TokenArrays(codes.arrays, 13)
    one = codec.decode(fewer, mx.float32, slice(1, 2))
    assert mx.allclose(whole[:, 1:2, :13], one, rtol=1e-5, atol=1e-5).item()


@each_codec
def test_more_bits_less_error(name):
    x, widths = vectors(128, 150), codec_info(name).widths
    errors = [mse(made(name, bits, side="keys"), x) for bits in widths]
    # Adjacent widths of outliers are a quarter of a bit apart.
    assert all(low < high * 0.95 for high, low in pairwise(errors))


@each_codec
def test_zero_tiny_and_huge_vectors_stay_finite(name):
    x = mx.stack([mx.zeros(64), mx.full(64, 1e-15), mx.full(64, 1e15), mx.ones(64)])
    for side in sides(name):
        codec = made(name, dim=64, side=side)
        got = codec.decode(codec.encode(x[None, None]), mx.float32)
        assert mx.all(mx.isfinite(got)).item()
        assert mx.abs(got[0, 0, 0]).max().item() < 1e-3


@each_codec
def test_what_kernels_are_told_is_float32_and_no_constant(name):
    """MLX hands a kernel arrays under 8 elements in another address space."""
    for bits in codec_info(name).widths:
        codec = made(name, bits, 64)
        reads, makes = codec.kernel_format, codec.encode_format
        assert codec.kernel_format is reads  # made once
        if reads is not None:
            for array in (reads.params, reads.exact_params):
                assert array.dtype == mx.float32
                assert array.size >= 8
            assert reads.has_table == (reads.kind in (PAIRS, ANGLES))
            assert bool(reads.coefficients) == (reads.kind == POLYNOMIAL)
        if makes is not None:
            assert makes.table.dtype == mx.float32
            assert makes.table.size >= 8
            assert makes.words == codec.encode(vectors(64, 1)).arrays["words"].shape[-1]


@pytest.mark.parametrize("name", ["turboquant", "research.turboquant-plain"])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_scalar_encode_table_is_levels_boundaries_inverse_gains(name, bits):
    codec, n = made(name, bits), 2**bits
    table = codec.encode_format.table
    assert mx.array_equal(table[:n], codec.codebook.levels).item()
    assert mx.array_equal(table[n : 2 * n - 1], codec.codebook.boundaries).item()
    gains = codec.encode_format.template["GAINS"]
    rest = table[2 * n - 1 : 2 * n - 1 + gains]
    assert mx.allclose(1 / rest, mx.array(list(codec.gains))).item()


@pytest.mark.parametrize(
    ("name", "bits", "stored", "error"),
    [
        # Design tables: relative error of rotated vectors, every stored bit counted.
        ("rotated-int4", 4, 4.125, 0.0118),
        ("research.turboquant-plain", 3, 3.125, 0.0338),
        ("research.turboquant-drive", 4, 4.125, 0.0079),
        ("research.turboquant-prod", 3, 3.25, 0.180),
        ("research.turboquant-prod", 4, 4.25, 0.053),
        ("research.turboquant-outlier", 2.25, 2.5, 0.0914),
        ("research.turboangle", 3, 5.25, 0.0044),
        ("research.turboangle-fixed", 3, 3.125, 0.0337),
        ("research.polarquant", 3.875, 4.0, 0.0321),
        ("research.hqmq", 3, 3.6875, 0.0435),
        ("research.residual", 4, 4.25, 0.0130),
        ("research.affine", 4, 4.5, 0.0082),
        ("research.jl", 4, 4.0, 3.0),
        ("research.qjl", 3, 3.125, math.pi / 2 / 3),
    ],
)
def test_error_at_d_128(name, bits, stored, error):
    codec = made(name, bits, side=sides(name)[-1])
    assert codec.bits_per_vector == stored * 128
    got = mse(codec, vectors(128, 3000))
    assert got == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(
    ("name", "dim", "says"),
    [
        ("research.turboangle", 33, "head_dim 33 is odd"),
        ("research.turboangle-fixed", 33, "head_dim 33 is odd"),
        ("research.polarquant", 72, "no multiple of 16"),
        ("research.hqmq", 33, "no multiple of 4"),
        ("research.affine", 72, "no multiple of 32"),
    ],
)
def test_dims_that_do_not_fit_are_refused_in_words(name, dim, says):
    with pytest.raises(UnsupportedError, match=says):
        made(name, dim=dim)

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import pytest
from cases import each_bits, each_dim
from codec_tools import mse, vectors

from mlx_turboquant.codecs import codec_for
from mlx_turboquant.spec import CodecSpec


def codec(bits, dim, side="values", **changes):
    return replace(codec_for(CodecSpec("turboquant", bits), dim, side), **changes)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_plain_rule_has_the_papers_distortion(dim, bits):
    """Scale ||x|| / sqrt(d), no search: D_mse of TurboQuant, within 1%."""
    plain = codec(bits, dim)
    x = vectors(dim, 6000)
    rms = mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True))
    got = plain.codebook.levels[plain.codebook.nearest(x / rms)] * rms
    error = mx.mean(mx.sum((x - got) ** 2, -1) / mx.sum(x * x, -1)).item()
    assert error == pytest.approx(plain.codebook.mse, rel=0.01)
    assert mse(replace(plain, gains=(1.0,)), x) < error * 1.001


@pytest.mark.parametrize(
    ("dim", "bits", "gain"),
    [(128, 2, 0.99), (128, 3, 0.94), (128, 4, 0.86), (64, 3, 0.90), (64, 4, 0.79)],
)
def test_scale_search_lowers_the_error(dim, bits, gain):
    side = codec(bits, dim)
    assert mse(side, vectors(dim, 6000)) < gain * side.codebook.mse


@each_dim
def test_more_bits_less_error(dim):
    x = vectors(dim, 500)
    errors = [mse(codec(bits, dim), x) for bits in range(1, 9)]
    assert all(low < 0.45 * high for high, low in pairwise(errors))
    assert 0 < errors[-1] < 1e-4


@each_bits
def test_keys_keep_their_norm(bits):
    x = vectors(128, 200)
    side = codec(bits, 128, "keys")
    got = side.decode(side.encode(x), mx.float32)
    ratio = mx.linalg.norm(got, axis=-1) / mx.linalg.norm(x, axis=-1)
    assert mx.abs(ratio - 1).max().item() < 1e-3


@each_bits
def test_values_have_the_least_squares_scale(bits):
    """The error is orthogonal to what is decoded."""
    x = vectors(128, 200)
    side = codec(bits, 128, "values")
    got = side.decode(side.encode(x), mx.float32)
    cosine = mx.sum((x - got) * got, -1) / mx.sum(x * x, -1)
    assert mx.abs(cosine).max().item() < 1e-3


@each_bits
def test_a_tokens_codes_depend_on_that_token_alone(bits):
    x = vectors(96, 70)
    side = codec(bits, 96)
    whole = side.encode(x)
    for part in (slice(0, 1), slice(13, 40), slice(69, 70)):
        alone = side.encode(x[:, :, part])
        for name, array in alone.arrays.items():
            assert mx.array_equal(array, whole.arrays[name][:, :, part]).item()


def test_zero_tiny_and_huge_vectors_stay_finite():
    x = mx.stack([mx.zeros(64), mx.full(64, 1e-15), mx.full(64, 1e15), mx.ones(64)])
    for side in ("keys", "values"):
        got = codec(3, 64, side).decode(
            codec(3, 64, side).encode(x[None, None]), mx.float32
        )
        assert mx.all(mx.isfinite(got)).item()
        assert mx.all(got[0, 0, 0] == 0).item()


def test_decode_some_heads():
    side = codec(3, 64)
    codes = side.encode(vectors(64, 20))
    whole = side.decode(codes, mx.float32)
    one = side.decode(codes, mx.float32, slice(1, 2))
    assert mx.array_equal(whole[:, 1:2], one).item()


@pytest.mark.parametrize(
    ("bits", "dim", "stored"), [(3, 128, 3.125), (4, 128, 4.125), (2, 64, 2.25)]
)
def test_bits_are_counted_whole(bits, dim, stored):
    side = codec(bits, dim)
    codes = side.encode(vectors(dim, 10))
    assert side.bits_per_vector == stored * dim
    assert 8 * codes.nbytes == 2 * 10 * side.bits_per_vector


def test_identity_is_exact():
    side = codec_for(CodecSpec("identity", 16), 40, "keys")
    x = vectors(40, 30).astype(mx.float16)
    assert mx.array_equal(side.decode(side.encode(x), mx.float16), x).item()
    assert side.rotation.forward(x).dtype == mx.float16  # not twice the bytes
    assert mx.array_equal(side.rotation.forward(x), x).item()

"""What the papers of the comparisons say, held to their codecs."""

import math

import mlx.core as mx
import numpy as np
import pytest
from codec_tools import made, mse, vectors
from helpers import attend

import mlx_turboquant as tq
from mlx_turboquant.codecs.research import (
    hqmq,
    polarquant,
    turboangle,
    turboangle_fixed,
)
from mlx_turboquant.codecs.research.gaussian import gaussian_matrix
from mlx_turboquant.codecs.research.hqmq import hurwitz_units, product
from mlx_turboquant.codecs.research.residual import residual
from mlx_turboquant.errors import FormatError, UnsupportedError
from mlx_turboquant.spec import CodecSpec


def test_prod_is_unbiased_and_noisier():
    """Mean of <q, decoded> / <q, x> over sketches is 1; TurboQuant's is under 1."""
    x = mx.random.normal((1, 1, 4000, 64))
    q = x + 0.5 * mx.random.normal(x.shape)
    truth = mx.sum(q * x, -1)

    def slope(codec):
        got = mx.sum(q * codec.decode(codec.encode(x), mx.float32), -1)
        scale = mx.mean(truth * truth)
        bias = mx.mean(got * truth) / scale - 1
        return bias.item(), mx.sqrt(mx.mean((got - truth) ** 2) / scale).item()

    prod = [
        slope(made("research.turboquant-prod", 2, 64, "keys", seed))
        for seed in range(8)
    ]
    plain = slope(made("research.turboquant-plain", 2, 64, "keys"))
    assert abs(np.mean([bias for bias, _ in prod])) < 0.01
    assert plain[0] < -0.1
    base = made("research.turboquant-plain", 1, 64, "keys").codebook.mse
    # Theorem 2: the residual's sketch adds pi / 2 - 1 of its square per dim.
    noise = np.mean([deviation for _, deviation in prod])
    assert noise == pytest.approx(
        math.sqrt((math.pi / 2) * base * 1.25 / 64 / 1.0), rel=0.15
    )


@pytest.mark.parametrize("name", ["qjl", "jl"])
def test_sketches_of_keys_are_unbiased(name):
    x = mx.random.normal((1, 1, 500, 64))
    got = []
    for seed in range(30):
        codec = made(f"research.{name}", 4, 64, "keys", seed)
        x_rot = codec.rotation.forward(x)
        got.append(
            codec.rotation.inverse(codec.decode(codec.encode(x_rot), mx.float32))
        )
    mean = sum(got) / len(got)
    assert (mx.sum(mean * x) / mx.sum(x * x)).item() == pytest.approx(1, abs=0.01)
    # And the mean of 30 seeds is far closer than one of them.
    apart = [mx.mean((y - x) ** 2).item() for y in (got[0], mean)]
    assert apart[1] < 0.06 * apart[0]


def test_eden_is_unbiased_and_drive_is_orthogonal():
    x = vectors(128, 2000)
    for bits in (1, 2, 3):
        eden, drive = (
            made(f"research.turboquant-{n}", bits) for n in ("eden", "drive")
        )
        got = eden.decode(eden.encode(x), mx.float32)
        assert mx.abs(mx.sum(got * x, -1) / mx.sum(x * x, -1) - 1).max().item() < 1e-3
        assert mse(drive, x) < mse(eden, x)


def test_the_outlier_split_is_what_the_paper_counts():
    """32 channels at 3 bits and 96 at 2 are 2.25, not 2.5; two scales make 2.5."""
    codec = made("research.turboquant-outlier", 2.25)
    assert (codec.strong.dim, codec.strong.bits) == (32, 3)
    assert (codec.weak.dim, codec.weak.bits) == (96, 2)
    assert codec.bits_per_vector / 128 == 2.25 + 2 * 16 / 128
    with pytest.raises(UnsupportedError, match="splits into 4 and 12"):
        made("research.turboquant-outlier", 2.25, dim=16)


def test_strong_channels_get_the_outliers_bits():
    """A few heavy channels: ordered by power they lose less than in any order."""
    gains = mx.where(mx.arange(64) % 4 == 0, 8.0, 1.0)
    keys = mx.random.normal((1, 2, 300, 64)) * gains
    cache = tq.TurboQuantCache(
        "k2.25v2.25,codec=research.turboquant-outlier,equalize=off"
    )
    sides = cache.update_and_fetch(keys, keys)
    attend(keys, *sides, 0.02, "causal")
    cache.update_and_fetch(keys[:, :, :1], keys[:, :, :1])
    order = cache.keys_and_values()[0].quantizer.transform.channel_order
    assert order.shape == (1, 2, 1, 64)
    assert set(np.array(order)[0, 0, 0, :16].tolist()) == set(range(0, 64, 4))


def test_turboangles_bits_are_the_papers():
    """6.56 bits for Mistral-7B: 3.25 of angles, 4 layers boosted, norms, two ends."""
    total = 0
    for layer in range(32):
        k_bits, v_bits = (4, 3.5) if layer < 4 else (3.5, 3)
        for side, bits in (("keys", k_bits), ("values", v_bits)):
            total += made("research.turboangle", bits, side=side).bits_per_vector
    assert total / 32 / 256 == 6.5625
    assert made("research.turboangle", 3.5, side="keys").bits_per_vector / 128 == 7.75
    assert made("research.turboangle", 3, side="values").bits_per_vector / 128 == 5.25


def test_any_number_of_angles():
    """48 bins: the error of an angle, (2 pi / n)^2 / 12, and 6 bits for it."""
    spec = CodecSpec("research.turboangle", 3)
    codec = turboangle.TurboAngle(
        spec, 128, made("research.turboangle").rotation, 8, 48
    )
    assert codec.bits_per_vector == 64 * (6 + 8) + 32
    error = mse(codec, vectors(128, 1000))
    assert error == pytest.approx((2 * math.pi / 48) ** 2 / 12, rel=0.03)


def test_stages_add_up():
    x = vectors(128, 500)
    spec = CodecSpec("research.residual", 4)
    errors = [mse(residual(spec, 128, 0, (2,) * n), x) for n in (1, 2, 3)]
    assert errors[1] < 0.15 * errors[0]
    assert errors[2] < 0.15 * errors[1]


def test_hurwitz_units_are_a_group():
    units = hurwitz_units()
    assert np.allclose(np.linalg.norm(units, axis=1), 1)
    products = product(units[:, None], units[None]).reshape(-1, 4)
    found = {tuple(row) for row in np.round(products * 2).astype(int)}
    assert found == {tuple(row) for row in np.round(units * 2).astype(int)}
    assert len(found) == 24


def test_a_heavy_chunk_is_kept_apart():
    x = np.ones((1, 1, 1, 64), np.float32)
    x[..., 20:24] = 100
    codec = made("research.hqmq", 3, 64)
    got = np.array(codec.decode(codec.encode(mx.array(x)), mx.float32))
    assert np.array_equal(got[..., 20:24], x[..., 20:24])
    assert abs(got[..., :20] - 1).max() < 0.6


def test_what_codes_are_decoded_with_is_the_same_everywhere():
    matrix = np.array(gaussian_matrix(64, 64, 0))
    assert matrix.mean() == pytest.approx(0, abs=0.04)
    assert matrix.std() == pytest.approx(1, abs=0.03)
    assert matrix[0, :3] == pytest.approx([1.4584039, -0.725554, 1.3580296], abs=1e-6)
    radii, _ = turboangle_fixed._radii(4)
    assert radii == pytest.approx([0.529275, 1.114404, 1.72462, 2.529109])
    assert np.array(polarquant._angles(3).levels) == pytest.approx(
        [0.524214, 0.705909, 0.864887, 1.046582]
    )
    assert np.array(hqmq._length_codebook(8).levels)[:3] == pytest.approx(
        [0.747962, 1.165177, 1.511869]
    )


def test_saved_caches_are_for_the_version_that_wrote_them(monkeypatch):
    """The saved format promises nothing for comparisons, and says so in words."""
    cache = tq.TurboQuantCache("3,codec=research.hqmq")
    kv = mx.random.normal((1, 2, 200, 64))
    attend(kv, *cache.update_and_fetch(kv, kv), 0.1)
    again = tq.TurboQuantCache("3")
    saved, promised = cache.state, tq.TurboQuantCache("3,codec=trellis").state
    again.state = saved
    assert str(again.spec) == str(cache.spec)
    monkeypatch.setattr("mlx_turboquant.cache.state.__version__", "9.9")
    again.state = promised
    with pytest.raises(FormatError, match=r"format \S+ is not \d+\+9\.9"):
        again.state = saved

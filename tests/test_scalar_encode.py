"""Encoding on the CPU: words and scales against the definition, bit for bit."""

import platform
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from cases import each_bits
from codec_tools import made, vectors
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.backends.cpu import Cpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.backends.scalar_encode import MAX_BITS, Packer, encoder_for
from mlx_turboquant.packing import pack
from mlx_turboquant.quantizer import PageMeans, Quantizer
from mlx_turboquant.spec import CodecSpec

f32 = np.float32


def sum_in_order(x):
    total = x[:, 0].copy()
    for column in x.T[1:]:
        total += column
    return total[:, None]


def spelled_out(codec, x):
    """Codes and scales of vectors (N, dim): `codecs.turboquant` in numpy's float32."""
    dim = codec.dim
    boundaries = np.array(codec.codebook.boundaries)
    levels = np.array(codec.levels(mx.arange(2**codec.bits)))
    rms = np.sqrt(sum_in_order(x * x) * f32(1 / dim))
    y = x / np.where(rms > 0, rms, f32(1))
    best = None
    for gain in codec.gains:
        codes = np.searchsorted(boundaries, y * f32(1 / gain), side="right")
        c = levels[codes]
        dot, code_sq = sum_in_order(y * c), sum_in_order(c * c)
        if best is None:
            best = codes, dot, code_sq
            continue
        better = dot * dot * best[2] > best[1] * best[1] * code_sq
        new = (codes, dot, code_sq)
        best = [np.where(better, a, b) for a, b in zip(new, best, strict=True)]
    codes, dot, code_sq = best
    code_sq = np.maximum(code_sq, f32(1e-30))
    if codec.scale_rule == "norm":
        scale = rms * np.sqrt(f32(dim) / code_sq)
    else:
        scale = rms * dot / code_sq
    return codes, np.clip(scale, -65504, 65504).astype(np.float16)


def assert_same(codec, x, got):
    codes, scales = spelled_out(codec, np.array(x).reshape(-1, codec.dim))
    words = np.array(got.arrays["words"]).reshape(len(codes), -1)
    assert np.array_equal(words, np.array(pack(mx.array(codes), codec.bits)))
    stored = np.array(got.arrays["scales"]).reshape(-1, 1)
    assert np.array_equal(stored.view(np.uint16), scales.view(np.uint16))


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("dim", [64, 80, 128])
@each_bits
def test_codes_and_scales_are_the_definitions_bit_for_bit(bits, dim, side):
    quantizer = Quantizer.of(CodecSpec("turboquant", bits), dim, side)
    x = vectors(dim, 700)  # more than a block
    x_rot = quantizer.encode_rot(x)
    got = Cpu().encode(quantizer, x, 0)
    assert got.arrays["words"].shape[:3] == (1, 2, 700)
    assert_same(quantizer.codec, x_rot, got)
    if platform.machine() == "x86_64":  # elsewhere MLX sums rows in another order
        assert_same(quantizer.codec, x_rot, quantizer.codec.encode(x_rot))


@pytest.mark.parametrize("bits", range(2, MAX_BITS + 1))
def test_ties_go_up_on_both_sides_of_zero(bits):
    """Vectors whose root mean square is 1, so that y / g hits boundaries at g = 1."""
    codec = replace(made("turboquant", bits, 64), gains=(1.0,))
    boundaries = np.array(codec.codebook.boundaries)
    x = np.random.default_rng(bits).normal(0, 0.5, (4000, 64)).astype(f32)
    places = np.random.default_rng(1).integers(0, len(boundaries), (4000, 16))
    x[:, :16] = boundaries[places]
    x[:, 40] = -0.0
    rest = 64 - (x[:, :-1].astype(np.float64) ** 2).sum(axis=1)
    x[:, -1] = np.sqrt(np.maximum(rest, 0))
    exact = x[(sum_in_order(x * x) * f32(1 / 64) == 1)[:, 0]]
    assert len(exact) > 100
    assert_same(codec, exact, encoder_for(codec).encode(mx.array(exact)[None, None]))


def test_zero_tiny_and_huge_vectors():
    codec = made("turboquant", 3, 64)
    rows = [mx.zeros(64), mx.full(64, 1e-15), mx.full(64, 1e15), -mx.ones(64)]
    x = mx.stack(rows)[None, None]
    assert_same(codec, x, encoder_for(codec).encode(x))


@pytest.mark.parametrize("count", [1, 2, 3, 33])
def test_a_few_vectors(count):
    codec = made("turboquant", 4, 128)
    x = mx.random.normal((1, 1, count, 128))
    assert_same(codec, x, encoder_for(codec).encode(x))


@given(st.integers(1, 8), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_products_pack_as_shifts_do(bits, dim, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (5, dim))
    words = Packer.of(bits, dim).pack(mx.array(codes.T.astype(f32)))
    assert mx.array_equal(words, pack(mx.array(codes), bits)).item()


def test_page_means_are_taken_off_as_by_the_definition():
    x = mx.random.normal((2, 2, 64, 64)) + 3
    words = []
    for backend in (Cpu(), Reference()):
        plain = Quantizer.of(CodecSpec("turboquant", 3), 64)
        quantizer = replace(plain, means=PageMeans(32))
        words.append(backend.encode(quantizer, x, 0).arrays["words"])
        assert quantizer.means.count == 2
    assert mx.array_equal(*words).item()

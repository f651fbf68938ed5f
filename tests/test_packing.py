import mlx.core as mx
import numpy as np
import pytest
from cases import each_bits
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.packing import pack, unpack, words_per_vector


@given(st.integers(1, 8), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(bits, dim, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, 3, dim))
    words = pack(mx.array(codes), bits)
    assert words.dtype == mx.uint32
    assert words.shape == (2, 3, words_per_vector(bits, dim))
    assert np.array_equal(np.array(unpack(words, bits, dim)), codes)


@each_bits
def test_chunk_of_32_is_exactly_bits_words(bits):
    assert [words_per_vector(bits, d) for d in (32, 64, 128)] == [
        bits,
        2 * bits,
        4 * bits,
    ]


def test_ragged_dims_round_up_to_one_word_at_most():
    for bits in range(1, 9):
        for dim in range(1, 200):
            assert 0 <= 32 * words_per_vector(bits, dim) - bits * dim < 32 + 2 * bits


@each_bits
def test_layout_is_the_documented_one(bits):
    """A scalar restatement of the module's docstring, bit by bit."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, 32)
    per_half, halves = 16 // bits, [[0] * bits, [0] * bits]
    spare = 16 - per_half * bits
    for half in (0, 1):
        stream = []
        for pair, code in enumerate(codes[half::2]):
            if pair < per_half * bits:
                place = bits * (pair % per_half)
                halves[half][pair // per_half] |= int(code) << place
            else:
                stream += [(int(code) >> k) & 1 for k in range(bits)]
        for n, bit in enumerate(stream):
            halves[half][n // spare] |= bit << (16 - spare + n % spare)
    want = [low | high << 16 for low, high in zip(*halves, strict=True)]
    assert pack(mx.array(codes), bits).tolist() == want


@pytest.mark.parametrize(
    ("bits", "golden"),
    [
        (1, [0x2BEC5B36]),
        (2, [0x0DF9E41B, 0x3C96D2B4]),
        (3, [0xC7B8D39A, 0x9F0C5A71, 0x2D6E8B43]),
    ],
)
def test_golden_words_decode_the_same_forever(bits, golden):
    """Fails when the layout changes; raise FORMAT_VERSION then."""
    codes = unpack(mx.array(golden, dtype=mx.uint32), bits, 32)
    assert pack(codes, bits).tolist() == golden
    first = [g & (2**bits - 1) for g in golden[:1]]
    assert codes[0].item() == first[0]
    assert codes[1].item() == (golden[0] >> 16) & (2**bits - 1)
    digest = sum((i + 1) * c for i, c in enumerate(codes.tolist()))
    assert digest == {1: 287, 2: 794, 3: 1961}[bits]

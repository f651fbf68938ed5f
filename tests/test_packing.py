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


def test_other_dims_are_padded_to_whole_groups():
    for bits in range(1, 9):
        for dim in range(1, 200):
            groups = -(-dim // 16)
            alone = (groups % 2) * (bits % 2) * 16  # half a shared word stays empty
            assert 32 * words_per_vector(bits, dim) == 16 * groups * bits + alone


@each_bits
def test_layout_is_the_documented_one(bits):
    """A scalar restatement of the module's docstring, bit by bit, for 3 groups."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, 48)
    words = [0] * words_per_vector(bits, 48)
    own, odd = bits // 2, bits % 2
    for group in range(3):
        chunk, place = divmod(group, 2)
        width = 2 if chunk == 0 else 1
        fields = [(chunk * bits + place * own + i, 0, 16) for i in range(own)]
        fields += [(chunk * bits + width * own, 8 * place, 8)] * odd
        for parity in (0, 1):
            pairs = [int(c) for c in codes[16 * group + parity : 16 * group + 16 : 2]]
            free = []
            for word, start, size in fields:
                for slot in range(size // bits):
                    code = pairs.pop(0)
                    words[word] |= code << (16 * parity + start + slot * bits)
                used = size // bits * bits
                free += [(word, 16 * parity + start + bit) for bit in range(used, size)]
            stream = [(code >> k) & 1 for code in pairs for k in range(bits)]
            for (word, bit), value in zip(free, stream, strict=True):
                words[word] |= value << bit
    assert pack(mx.array(codes), bits).tolist() == words


@pytest.mark.parametrize(
    ("bits", "golden", "digest"),
    [
        (1, [0x2BEC5B36], 287),
        (2, [0x0DF9E41B, 0x3C96D2B4], 794),
        (3, [0xC7B8D39A, 0x9F0C5A71, 0x2D6E8B43], 1811),
    ],
)
def test_golden_words_decode_the_same_forever(bits, golden, digest):
    """Fails when the layout changes; raise FORMAT_VERSION then."""
    codes = unpack(mx.array(golden, dtype=mx.uint32), bits, 32)
    assert pack(codes, bits).tolist() == golden
    assert sum((i + 1) * code for i, code in enumerate(codes.tolist())) == digest

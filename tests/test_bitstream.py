import mlx.core as mx
import numpy as np
import pytest

from mlx_turboquant.bitstream import BitStream


@pytest.mark.parametrize("pattern", [(3,), (8,), (5,), (3, 2), (12,), (1,), (4, 2, 2)])
@pytest.mark.parametrize("count", [32, 64, 13])
def test_streams_round_trip(pattern, count):
    stream = BitStream(pattern, count)
    rng = np.random.default_rng(0)
    widths = [pattern[i % len(pattern)] for i in range(count)]
    codes = mx.array(rng.integers(0, 2 ** np.array(widths), (2, 3, count)))
    words = stream.pack(codes)
    assert words.shape == (2, 3, stream.words)
    assert stream.words == -(-sum(widths) // 32)
    assert mx.array_equal(stream.read(words), codes.astype(mx.uint32)).item()
    # The definition, bit by bit.
    at = np.cumsum([0, *widths])[:-1]
    number = sum(int(w) << (32 * i) for i, w in enumerate(np.array(words)[1, 2]))
    read = [number >> int(a) & (2**w - 1) for a, w in zip(at, widths, strict=True)]
    assert read == np.array(codes)[1, 2].tolist()


def test_wide_reads_wrap_to_the_start():
    stream = BitStream((3,), 32)
    codes = mx.arange(32)[None] % 8
    words = stream.pack(codes)
    number = sum(int(w) << (32 * i) for i, w in enumerate(np.array(words)[0]))
    number |= number << 96
    want = [number >> (3 * i) & 255 for i in range(32)]
    assert np.array(stream.read(words, 8))[0].tolist() == want

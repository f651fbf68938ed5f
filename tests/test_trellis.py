"""The trellis codec: its error, its search, its tables."""

import hashlib
import json

import mlx.core as mx
import numpy as np
import pytest
from codec_tools import made, mse, vectors

from mlx_turboquant.bitstream import BitStream
from mlx_turboquant.codecs import codec_for, codec_info, trellis, viterbi
from mlx_turboquant.spec import CodecSpec

WIDTHS = codec_info("trellis").widths


@pytest.mark.parametrize(
    ("bits", "error"),
    [(2, 0.0747), (2.5, 0.0391), (3, 0.0201), (3.5, 0.0106), (4, 0.0054)],
)
def test_it_has_its_error(bits, error):
    """Within 1% of the design's, or better; at 0.125 bits more than its rate."""
    codec = made("trellis", bits)
    assert codec.bits_per_vector == (bits + 0.125) * 128
    got = mse(codec, vectors(128, 4000))
    print(f"{bits:g} bits: {got:.5f}")
    assert 0.95 * error < got < 1.01 * error + 0.00005  # the design's last digit
    if bits == int(bits):
        scalar = codec_for(CodecSpec("turboquant", int(bits)), 128, "values")
        assert got < 0.7 * scalar.codebook.mse


def test_it_closes_and_its_windows_are_the_streams():
    """What is decoded from words alone is the path that was found."""
    for bits in WIDTHS:
        codec = made("trellis", bits)
        y = mx.round(vectors(128, 6)[0, 0] * 40)
        y = mx.clip(y, -viterbi.CLIP, viterbi.CLIP)
        windows = viterbi.best_windows(codec.graph, y)
        own = [(1 << w) - 1 for w in codec.widths] * (128 // len(codec.widths))
        stream = BitStream(codec.widths, 128)
        words = stream.pack(windows & mx.array(own, dtype=mx.uint32))
        assert mx.array_equal(stream.read(words, 8), windows).item()


@pytest.mark.parametrize("bits", [1, 2.5, 3, 4])
def test_both_searches_find_the_same_path(bits):
    codec = made("trellis", bits)
    y = mx.clip(mx.round(vectors(64, 20)[0, 0] / codec.step * 2), -380, 380)
    by_numpy = viterbi.best_windows(codec.graph, y)
    by_mx = viterbi._MxSearch(codec.graph).search(y[:, ::-1].T).T[:, ::-1]
    assert mx.array_equal(by_numpy, by_mx.astype(mx.uint32)).item()


def test_the_search_finds_the_best_path_through_its_state():
    """Against all 2**12 streams of short vectors that cross their end in that state."""
    codec = made("trellis", 1, dim=32)
    graph = codec.graph
    levels = np.array(graph.levels[0], dtype=np.float64)
    streams = np.arange(1 << 12)
    windows = np.stack([((streams | streams << 12) >> i) & 255 for i in range(12)])
    targets = np.array(mx.round(mx.random.normal((20, 12)) / codec.step * 2))
    steps = np.ascontiguousarray(targets[:, ::-1].T)
    paths = viterbi._NumpySearch(graph).search(steps)[::-1]
    for path, y in zip(paths.T, targets.astype(np.float64), strict=True):
        same = windows[:, windows[0] & 127 == path[0] & 127]
        best = ((levels[same] - y[:, None]) ** 2).sum(axis=0).min()
        assert ((levels[path] - y) ** 2).sum() == best


def test_tables_are_whole_numbers_and_odd():
    for bits in WIDTHS:
        widths, levels = trellis.trained_levels(bits)
        whole = np.array(levels)
        assert len(widths) == len(whole)
        assert np.array_equal(whole, np.round(whole))
        assert np.abs(whole).max() == 127
        assert np.array_equal(whole[:, :128], -whole[:, 128:])


def test_kernels_are_told_the_same_levels():
    for bits in WIDTHS:
        codec = made("trellis", bits)
        reads, makes = codec.kernel_format, codec.encode_format
        even, odd = np.array(codec.levels[0]), np.array(codec.levels[-1])
        gain, *table = np.array(reads.params).tolist()
        assert gain == pytest.approx(32 * codec.step)
        assert np.array_equal(32 * np.array(table[::2]), even[:128])
        assert np.array_equal(32 * np.array(table[1::2]), odd[:128])
        *levels, unit = np.array(makes.table).tolist()
        assert np.array_equal(levels, 2 * np.concatenate([even, odd]))
        assert unit == pytest.approx(codec.step / 2)


def test_tables_never_change():
    """A changed table needs a new format version."""
    tables = [[entry["unit"], entry["levels"]] for entry in trellis._tables().values()]
    text = json.dumps(tables).encode()
    assert hashlib.sha256(text).hexdigest()[:16] == "044ceeef8e5881f2"

"""The trellis codec: its error, its search, its levels."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from codec_tools import made, mse, vectors

from mlx_turboquant.bitstream import BitStream
from mlx_turboquant.codecs import codec_for, codec_info, viterbi
from mlx_turboquant.codecs.trellis_levels import FORMULAS, window_levels
from mlx_turboquant.spec import CodecSpec

WIDTHS = codec_info("trellis").widths


@pytest.mark.parametrize(
    ("bits", "error"),
    [(2, 0.0743), (2.5, 0.0390), (3, 0.0200), (3.5, 0.0107), (4, 0.0055)],
)
def test_it_has_its_error(bits, error):
    """Within 1% of what it was chosen with; at 0.125 bits more than its rate."""
    codec = made("trellis", bits)
    assert codec.bits_per_vector == (bits + 0.125) * 128
    got = mse(codec, vectors(128, 4000))
    print(f"{bits:g} bits: {got:.5f}")
    assert 0.95 * error < got < 1.01 * error + 0.00005  # the last digit
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
        own = [(1 << w) - 1 for w in codec.formula.widths] * 64
        stream = BitStream(codec.formula.widths, 128)
        words = stream.pack(windows & mx.array(own, dtype=mx.uint32))
        assert mx.array_equal(stream.read(words, 8), windows).item()


@pytest.mark.parametrize("bits", [1, 2.5, 3, 4])
def test_both_searches_find_the_same_path(bits):
    codec = made("trellis", bits)
    y = mx.clip(mx.round(vectors(64, 20)[0, 0] / codec.search_step), -380, 380)
    by_numpy = viterbi.best_windows(codec.graph, y)
    by_mx = viterbi._MxSearch(codec.graph).search(y[:, ::-1].T).T[:, ::-1]
    assert mx.array_equal(by_numpy, by_mx.astype(mx.uint32)).item()


def test_the_search_finds_the_best_path_through_its_state():
    """Against all 2**12 streams of short vectors that cross their end in that state."""
    codec = made("trellis", 1, dim=32)
    graph = codec.graph
    levels = np.array(graph.levels[::-1], dtype=np.float64)
    streams = np.arange(1 << 12)
    windows = np.stack([((streams | streams << 12) >> i) & 255 for i in range(12)])
    targets = np.array(mx.round(mx.random.normal((20, 12)) / codec.search_step))
    steps = np.ascontiguousarray(targets[:, ::-1].T)
    paths = viterbi._NumpySearch(graph).search(steps)[::-1]
    for path, y in zip(paths.T, targets.astype(np.float64), strict=True):
        same = windows[:, windows[0] & 127 == path[0] & 127]
        turns = np.arange(12) % 2
        best = ((levels[turns[:, None], same] - y[:, None]) ** 2).sum(axis=0).min()
        assert ((levels[turns, path] - y) ** 2).sum() == best


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_what_halves_lose(bits):
    """By the operations of a decode kernel, to the last bit before the polynomial."""
    formula = FORMULAS[bits]
    number = (1024 + np.arange(256)).astype(np.float16)
    for multiplier, levels in zip(formula.multipliers, formula.levels, strict=True):
        product = number * np.float16(multiplier / 512)
        assert product.dtype == np.float16
        assert np.all((product >= 2048) & (product <= 4096))
        exact = number.astype(np.float64) * (multiplier / 512)
        u = exact - product.astype(np.float64)
        assert np.array_equal(u.astype(np.float16), u)
        assert len(set(u)) == 256
        np.testing.assert_allclose(
            u * ((u * u - formula.bend) ** 2 + formula.slope),
            levels / 4096,
            rtol=0,
            atol=0.5 / 4096,
        )
        for constant in (formula.bend, formula.slope):
            assert np.float16(constant) == constant


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_the_same_however_floats_are_fused(bits):
    """No level is so near to a tie that a float32's last bit decides."""
    formula = FORMULAS[bits]
    wide = np.float64
    for multiplier, levels in zip(formula.multipliers, formula.levels, strict=True):
        window = np.arange(1024, 1280, dtype=np.float32)
        product = window * np.float32(multiplier / 1024)
        u = 2 * (product - np.round(product))
        bend, slope = np.float32(formula.bend), np.float32(formula.slope)
        for bent in (u * u - bend, (wide(u) * wide(u) - bend).astype(np.float32)):
            fused = (wide(bent) * wide(bent) + slope).astype(np.float32)
            for last in (bent * bent + slope, fused):
                level = last * u
                assert level.dtype == np.float32
                assert np.array_equal(np.round(level * 4096), levels)


def test_levels_are_whole_numbers_that_the_search_sees_rounded():
    for bits in WIDTHS:
        codec = made("trellis", bits)
        levels = codec.formula.levels
        assert np.array_equal(levels, np.round(levels))
        searched = np.array(codec.graph.levels[::-1])
        assert np.array_equal(searched, np.round(searched))
        assert np.abs(searched).max() == 254
        gap = searched * codec.search_step - levels * codec.step
        assert np.abs(gap).max() <= codec.search_step / 2 * 1.00001


def test_kernels_are_told_the_same_levels():
    for bits in WIDTHS:
        codec = made("trellis", bits)
        reads, makes = codec.kernel_format, codec.encode_format
        gain, even, odd, *shape = np.array(reads.params).tolist()
        assert gain == pytest.approx(4096 * codec.step)
        assert not any(shape[2:])
        for twice, levels in zip((even, odd), codec.formula.levels, strict=True):
            assert np.array_equal(window_levels(512 * twice, *shape[:2]), levels)
        table = np.array(makes.table)
        assert np.array_equal(table[:512], codec.graph.levels[::-1].ravel())
        assert table[512] == pytest.approx(codec.search_step)
        want = (codec.formula.levels * codec.step).ravel()
        np.testing.assert_allclose(table[513:], want, rtol=1e-6)


def test_levels_never_change():
    """Other levels need a new format version."""
    formulas = [FORMULAS[bits] for bits in WIDTHS]
    text = repr([(f.widths, f.multipliers, f.bend, f.slope, f.gain) for f in formulas])
    levels = b"".join(f.levels.astype("<i2").tobytes() for f in formulas)
    digest = hashlib.sha256(text.encode() + levels).hexdigest()[:16]
    assert digest == "6e64e34b491a7232"

"""Laws that every codec obeys, and what each one's paper says of it."""

import hashlib
import json
import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from helpers import attend
from test_codecs import mse, vectors

import mlx_turboquant as tq
from mlx_turboquant.bitstream import Stream
from mlx_turboquant.codecs import (
    codec_for,
    hqmq,
    lloyd,
    polarquant,
    trellis,
    turboangle,
    turboangle_fixed,
    viterbi,
)
from mlx_turboquant.codecs.hqmq import hurwitz_units, product
from mlx_turboquant.codecs.residual import residual
from mlx_turboquant.codecs.sketch import gaussian
from mlx_turboquant.errors import UnsupportedError
from mlx_turboquant.spec import CODEC_NAMES, KEYS_ONLY, WIDTHS, CodecSpec

each_codec = pytest.mark.parametrize("name", CODEC_NAMES)


def made(name, bits=None, dim=128, side="values", seed=0):
    return codec_for(CodecSpec.of(name, bits or WIDTHS[name][-1]), dim, side, seed)


def sides(name):
    return ("keys",) if name in KEYS_ONLY else ("keys", "values")


@each_codec
def test_bits_are_counted_whole_and_arrays_named(name):
    for bits in (WIDTHS[name][0], WIDTHS[name][-1]):
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
    x = vectors(128, 150)
    errors = [mse(made(name, bits, side="keys"), x) for bits in WIDTHS[name]]
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


@pytest.mark.parametrize(
    ("name", "bits", "stored", "error"),
    [
        # Design tables: relative error of rotated vectors, every stored bit counted.
        ("turboquant-plain", 3, 3.125, 0.0338),
        ("turboquant-drive", 4, 4.125, 0.0079),
        ("turboquant-prod", 3, 3.25, 0.180),
        ("turboquant-prod", 4, 4.25, 0.053),
        ("turboquant-outlier", 2.25, 2.5, 0.0914),
        ("turboangle", 3, 5.25, 0.0044),
        ("turboangle-fixed", 3, 3.125, 0.0337),
        ("polarquant", 3.875, 4.0, 0.0321),
        ("rotated-int4", 4, 4.125, 0.0118),
        ("hqmq", 3, 3.6875, 0.0435),
        ("residual", 4, 4.25, 0.0130),
        ("affine", 4, 4.5, 0.0082),
        ("jl", 4, 4.0, 3.0),
        ("qjl", 3, 3.125, math.pi / 2 / 3),
    ],
)
def test_error_at_d_128(name, bits, stored, error):
    codec = made(name, bits, side="keys" if name in KEYS_ONLY else "values")
    assert codec.bits_per_vector == stored * 128
    got = mse(codec, vectors(128, 3000))
    assert got == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(
    ("bits", "error"),
    [(2, 0.0747), (2.5, 0.0391), (3, 0.0201), (3.5, 0.0106), (4, 0.0054)],
)
def test_the_trellis_has_its_error(bits, error):
    """Within 1% of the design's, or better; at 0.125 bits more than its rate."""
    codec = made("trellis", bits)
    assert codec.bits_per_vector == (bits + 0.125) * 128
    got = mse(codec, vectors(128, 4000))
    print(f"{bits:g} bits: {got:.5f}")
    assert 0.95 * error < got < 1.01 * error + 0.00005  # the design's last digit
    if bits == int(bits):
        assert (
            got
            < 0.7
            * codec_for(CodecSpec("turboquant", int(bits)), 128, "values").book.mse
        )


def test_the_trellis_closes_and_its_windows_are_the_streams():
    """What is decoded from words alone is the path that was found."""
    for bits in WIDTHS["trellis"]:
        codec = made("trellis", bits)
        y = mx.round(vectors(128, 6)[0, 0] * 40)
        y = mx.clip(y, -viterbi.FARTHEST, viterbi.FARTHEST)
        windows = viterbi.best_windows(codec._trellis, y)
        own = [(1 << w) - 1 for w in codec.widths] * (128 // len(codec.widths))
        stream = Stream(codec.widths, 128)
        words = stream.pack(windows & mx.array(own, dtype=mx.uint32))
        assert mx.array_equal(stream.windows(words, 8), windows).item()


@pytest.mark.parametrize("bits", [1, 2.5, 3, 4])
def test_both_searches_find_the_same_path(bits):
    codec = made("trellis", bits)
    y = mx.clip(mx.round(vectors(64, 20)[0, 0] / codec.unit * 2), -380, 380)
    by_numpy = viterbi.best_windows(codec._trellis, y)
    by_mx = viterbi._Mx(codec._trellis).search(y[:, ::-1].T).T[:, ::-1]
    assert mx.array_equal(by_numpy, by_mx.astype(mx.uint32)).item()


def test_the_search_finds_the_best_path_through_its_state():
    """Against all 2**12 streams of short vectors that cross their end in that state."""
    codec = made("trellis", 1, dim=32)
    search = codec._trellis
    levels = np.array(search.levels[0], dtype=np.float64)
    streams = np.arange(1 << 12)
    windows = np.stack([((streams | streams << 12) >> i) & 255 for i in range(12)])
    targets = np.array(mx.round(mx.random.normal((20, 12)) / codec.unit * 2))
    steps = np.ascontiguousarray(targets[:, ::-1].T)
    found = viterbi._Numpy(search).search(steps)[::-1]
    for path, y in zip(found.T, targets.astype(np.float64), strict=True):
        same = windows[:, windows[0] & 127 == path[0] & 127]
        best = ((levels[same] - y[:, None]) ** 2).sum(axis=0).min()
        assert ((levels[path] - y) ** 2).sum() == best


def test_tables_are_whole_numbers_and_odd():
    for bits in WIDTHS["trellis"]:
        widths, levels = trellis.table(bits)
        whole = np.array(levels)
        assert len(widths) == len(whole)
        assert np.array_equal(whole, np.round(whole))
        assert np.abs(whole).max() == 127
        assert np.array_equal(whole[:, :128], -whole[:, 128:])


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

    prod = [slope(made("turboquant-prod", 2, 64, "keys", seed)) for seed in range(8)]
    plain = slope(made("turboquant-plain", 2, 64, "keys"))
    assert abs(np.mean([bias for bias, _ in prod])) < 0.01
    assert plain[0] < -0.1
    base = made("turboquant-plain", 1, 64, "keys").book.mse
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
        codec = made(name, 4, 64, "keys", seed)
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
        eden, drive = (made(f"turboquant-{n}", bits) for n in ("eden", "drive"))
        got = eden.decode(eden.encode(x), mx.float32)
        assert mx.abs(mx.sum(got * x, -1) / mx.sum(x * x, -1) - 1).max().item() < 1e-3
        assert mse(drive, x) < mse(eden, x)


def test_the_outlier_split_is_what_the_paper_counts():
    """32 channels at 3 bits and 96 at 2 are 2.25, not 2.5; two scales make 2.5."""
    codec = made("turboquant-outlier", 2.25)
    assert (codec.strong.dim, codec.strong.bits) == (32, 3)
    assert (codec.weak.dim, codec.weak.bits) == (96, 2)
    assert codec.bits_per_vector / 128 == 2.25 + 2 * 16 / 128
    with pytest.raises(UnsupportedError, match="splits into 4 and 12"):
        made("turboquant-outlier", 2.25, dim=16)


def test_strong_channels_get_the_outliers_bits():
    """A few heavy channels: ordered by power they lose less than in any order."""
    gains = mx.where(mx.arange(64) % 4 == 0, 8.0, 1.0)
    keys = mx.random.normal((1, 2, 300, 64)) * gains
    cache = tq.TurboQuantCache("k2.25v2.25,codec=turboquant-outlier,equalize=off")
    sides = cache.update_and_fetch(keys, keys)
    attend(keys, *sides, 0.02, "causal")
    cache.update_and_fetch(keys[:, :, :1], keys[:, :, :1])
    order = cache.keys_and_values()[0].quantizer.transform.channel_order
    assert order.shape == (1, 2, 1, 64)
    assert set(np.array(order)[0, 0, 0, :16].tolist()) == set(range(0, 64, 4))


def test_turboangles_bits_are_the_papers():
    """6.56 bits for Mistral-7B: 3.25 of angles, 4 layers boosted, norms, two ends."""
    total = {}
    specs = turboangle.paper_specs("Mistral-7B", 32)
    for text in specs:
        spec = tq.CacheSpec.parse(text)
        keys = codec_for(spec.keys, 128, "keys").bits_per_vector
        values = codec_for(spec.values, 128, "values").bits_per_vector
        total[text] = (keys + values) / 256
    assert np.mean([total[text] for text in specs]) == 6.5625
    assert made("turboangle", 3.5, side="keys").bits_per_vector / 128 == 7.75
    assert made("turboangle", 3, side="values").bits_per_vector / 128 == 5.25
    for model, (layers, _) in turboangle.PAPER_SETTINGS.items():
        assert len(turboangle.paper_specs(model, 40)) == 40
        assert len(layers) == len(set(layers))


def test_any_number_of_angles():
    """48 bins: the error of an angle, (2 pi / n)^2 / 12, and 6 bits for it."""
    spec = CodecSpec("turboangle", 3)
    codec = turboangle.TurboAngle(spec, 128, made("turboangle").rotation, 8, 48)
    assert codec.bits_per_vector == 64 * (6 + 8) + 32
    error = mse(codec, vectors(128, 1000))
    assert error == pytest.approx((2 * math.pi / 48) ** 2 / 12, rel=0.03)


def test_stages_add_up():
    x = vectors(128, 500)
    spec = CodecSpec("residual", 4)
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
    codec = made("hqmq", 3, 64)
    got = np.array(codec.decode(codec.encode(mx.array(x)), mx.float32))
    assert np.array_equal(got[..., 20:24], x[..., 20:24])
    assert abs(got[..., :20] - 1).max() < 0.6


def test_lloyd_max_of_a_uniform_density_is_uniform():
    got = lloyd.solve(np.ones_like, 1.0, 4)
    assert np.allclose(got, [0.125, 0.375, 0.625, 0.875], atol=1e-4)


def test_what_saved_caches_are_decoded_with_never_changes():
    """A changed table or matrix needs a new format version."""
    matrix = np.array(gaussian(64, 64, 0))
    assert matrix.mean() == pytest.approx(0, abs=0.04)
    assert matrix.std() == pytest.approx(1, abs=0.03)
    assert matrix[0, :3] == pytest.approx([1.4584039, -0.725554, 1.3580296], abs=1e-6)
    tables = [[entry["unit"], entry["levels"]] for entry in trellis._tables().values()]
    text = json.dumps(tables).encode()
    assert hashlib.sha256(text).hexdigest()[:16] == "044ceeef8e5881f2"
    radii = turboangle_fixed._radii(4)
    assert radii == pytest.approx([0.529275, 1.114404, 1.72462, 2.529109])
    assert polarquant._angles(3) == pytest.approx(
        [0.524214, 0.705909, 0.864887, 1.046582]
    )
    assert hqmq._lengths(8)[:3] == pytest.approx([0.747962, 1.165177, 1.511869])


@pytest.mark.parametrize("pattern", [(3,), (8,), (5,), (3, 2), (12,), (1,), (4, 2, 2)])
@pytest.mark.parametrize("count", [32, 64, 13])
def test_streams_round_trip(pattern, count):
    stream = Stream(pattern, count)
    rng = np.random.default_rng(0)
    widths = [pattern[i % len(pattern)] for i in range(count)]
    codes = mx.array(rng.integers(0, 2 ** np.array(widths), (2, 3, count)))
    words = stream.pack(codes)
    assert words.shape == (2, 3, stream.words)
    assert stream.words == -(-sum(widths) // 32)
    assert mx.array_equal(stream.windows(words), codes.astype(mx.uint32)).item()
    # The definition, bit by bit.
    at = np.cumsum([0, *widths])[:-1]
    number = sum(int(w) << (32 * i) for i, w in enumerate(np.array(words)[1, 2]))
    read = [number >> int(a) & (2**w - 1) for a, w in zip(at, widths, strict=True)]
    assert read == np.array(codes)[1, 2].tolist()


def test_windows_go_round_the_circle():
    stream = Stream((3,), 32)
    codes = mx.arange(32)[None] % 8
    words = stream.pack(codes)
    number = sum(int(w) << (32 * i) for i, w in enumerate(np.array(words)[0]))
    number |= number << 96
    want = [number >> (3 * i) & 255 for i in range(32)]
    assert np.array(stream.windows(words, 8))[0].tolist() == want


@pytest.mark.parametrize(
    ("name", "dim", "says"),
    [
        ("turboangle", 33, "head_dim 33 is odd"),
        ("turboangle-fixed", 33, "head_dim 33 is odd"),
        ("polarquant", 72, "no multiple of 16"),
        ("hqmq", 33, "no multiple of 4"),
        ("affine", 72, "no multiple of 32"),
    ],
)
def test_dims_that_do_not_fit_are_refused_in_words(name, dim, says):
    with pytest.raises(UnsupportedError, match=says):
        made(name, dim=dim)

"""Encode and decode kernels against their definitions in plain mx.

Encoded words may differ only where the rounding of a sum decides between two choices
that are equally good: codewords whose angles to the vector have the same cosine in
float32. At 7 and 8 bits that happens to some percent of vectors, below to hardly any.
"""

import mlx.core as mx
import numpy as np
import pytest
from helpers import attend, relative_error

import mlx_turboquant as tq
from mlx_turboquant.backends import select
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.codecs import codec_for
from mlx_turboquant.quantizer import PageMeans, Quantizer
from mlx_turboquant.segments import CompressedTokens
from mlx_turboquant.tiles import in_tiles, in_vectors
from mlx_turboquant.tokens import TokenArrays
from mlx_turboquant.transform import ChannelTransform

#: spec, dims, heads, tokens
CASES = {
    "llama": ("k3v3", (128, 128), 2, 64),
    "two dims": ("k4v2", (64, 80), 2, 33),
    "one bit": ("k1v8", (96, 64), 1, 40),
    "five and six": ("k5v6", (72, 33), 1, 20),
    "seven": ("k7v3", (48, 256), 2, 17),
    "widest": ("k2v3", (512, 8), 1, 9),
    "eden": ("k3v2,codec=research.turboquant-eden", (64, 64), 1, 20),
    "plain": ("k3v2,codec=research.turboquant-plain", (64, 64), 1, 20),
}
#: Trellis searches are in whole numbers: the same words everywhere.
TRELLISES = {
    "usual": ("k3v3,codec=trellis", (128, 128), 1, 21),
    "half rates": ("k2.5v3.5,codec=trellis", (64, 96), 2, 13),
    "low": ("k1v1.5,codec=trellis", (64, 80), 1, 12),
    "high": ("k4v2,codec=trellis", (72, 256), 1, 9),
    "widest": ("k2v1,codec=trellis", (512, 33), 1, 5),
    "one side": ("k3v4,codec=trellis/rotated-int4", (64, 64), 1, 11),
}


def codecs_of(spec, dims):
    parsed = tq.CacheSpec.parse(spec)
    return (
        codec_for(parsed.keys, dims[0], "keys", 0),
        codec_for(parsed.values, dims[1], "values", 0),
    )


def vectors(heads, count, dims, dtype=mx.float32):
    """Slices of longer buffers, as a cache hands them over."""
    k = mx.random.normal((2, heads, count + 9, dims[0])).astype(dtype)
    v = mx.random.normal((2, heads, count + 9, dims[1])).astype(dtype)
    return k[:, :, 5 : 5 + count], 3 * v[:, :, 4 : 4 + count]


def quantizers_of(codecs, heads, tokens=0, page=16, gains=True):
    """Quantizers of unlike channels; of the keys with means of random pages, if any."""
    quantizers = []
    for index, codec in enumerate(codecs):
        scales = mx.exp(mx.random.normal((2, heads, 1, codec.dim)) / 2)
        transform = ChannelTransform(codec.rotation, scales if gains else None)
        means = None
        if index == 0 and tokens:
            means = PageMeans(page)
            means.append(mx.random.normal((2, heads, -(-tokens // page), codec.dim)))
        side = ("keys", "values")[index]
        quantizers.append(Quantizer(codec, transform, side, means))
    return quantizers


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_encode_is_the_definition(case, centered, launcher, mode):
    """Tokens 11 and on of two pages and a part of a third."""
    spec, dims, heads, count = CASES[case]
    codecs = codecs_of(spec, dims)
    sides = vectors(heads, count, dims)
    quantizers = quantizers_of(codecs, heads, 11 + count if centered else 0)
    check_encode(launcher, quantizers, sides, 11)
    if not centered:
        check_encode(launcher, quantizers_of(codecs, heads, gains=False), sides, 0)


@pytest.mark.parametrize("case", TRELLISES)
def test_encode_of_a_trellis_is_exact(case, launcher):
    check_trellis(launcher, *TRELLISES[case])


def test_encode_of_a_trellis_in_every_mode(launcher, mode):
    check_trellis(launcher, "k3v2.5,codec=trellis", (64, 32), 1, 9)


def test_means_are_added_as_pages_begin(launcher):
    """A first encoding of whole pages makes their means; a cut page keeps its own."""
    (codec, _) = codecs_of("k4v4", (64, 64))
    x = mx.random.normal((2, 1, 96, 64)) + 3
    transform = ChannelTransform(codec.rotation)
    want = Quantizer(codec, transform, "keys", PageMeans(32))
    got = Quantizer(codec, transform, "keys", PageMeans(32))
    backend = Gpu(launcher)
    for first, stop in ((0, 64), (40, 96)):  # as after a trim to 40 tokens
        for quantizer in (want, got):
            quantizer.means.keep(first)
        a = in_vectors(backend.encode(got, x[:, :, first:stop], first))
        b = want.encode(x[:, :, first:stop], first)
        assert got.means.count == want.means.count == stop // 32
        assert_same_choice(codec, centred(want, x[:, :, first:stop], first), a, b)
    with pytest.raises(ValueError, match="within the first 32 of a page of 32"):
        backend.encode(got, x[:, :, :50], 96)


def test_means_of_a_sample_are_those_of_whole_pages_tiles(launcher):
    (codec, _) = codecs_of("k4v4", (64, 64))
    x = mx.random.normal((2, 1, 160, 64)) + mx.arange(160)[:, None] / 20
    transform = ChannelTransform(codec.rotation)
    made = []
    for backend in (Reference(), Gpu(launcher)):
        quantizer = Quantizer(codec, transform, "keys", PageMeans(64))
        for first, stop in ((0, 96), (96, 160)):  # ends within a page
            backend.encode(quantizer.sampling(32), x[:, :, first:stop], first)
        made.append(quantizer.means.of_pages(0, 3))
    tiles = mx.stack([x[:, :, at : at + 32] for at in (0, 64, 128)], axis=2)
    want = transform.encode(mx.mean(tiles, axis=3))
    for got in made:
        assert got.shape == want.shape == (2, 1, 3, 64)
        assert mx.abs(got - want).max() < 2e-3 * mx.abs(want).max()


def centred(quantizer, x, first):
    """What the codec is given."""
    x_rot = quantizer.transform.encode(x)
    if quantizer.means is None:
        return x_rot
    return x_rot - quantizer.means.of_tokens(first, x.shape[2])


def encoded(launcher, quantizer, x, first):
    """What the backend encodes, brought from tile order to vector order."""
    codes = Gpu(launcher).encode(quantizer, x, first)
    assert codes.layout == quantizer.layout
    return in_vectors(codes)


def check_trellis(launcher, spec, dims, heads, count):
    codecs = codecs_of(spec, dims)
    sides = vectors(heads, count, dims)
    for quantizer, x in zip(
        quantizers_of(codecs, heads, 11 + count), sides, strict=True
    ):
        codec, y = quantizer.codec, centred(quantizer, x, 11)
        got = encoded(launcher, quantizer, x, 11)
        want = quantizer.encode(x, 11)
        differ = mx.any(got.arrays["words"] != want.arrays["words"], axis=-1)
        # A target may round the other way, where the sums before it were rounded.
        assert mx.sum(differ).item() <= 0.0002 * y.size
        errors = [relative_error(codec.decode(c, mx.float32), y) for c in (got, want)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def check_encode(launcher, quantizers, sides, first):
    for quantizer, x in zip(quantizers, sides, strict=True):
        got = encoded(launcher, quantizer, x, first)
        want = quantizer.encode(x, first)
        assert_same_choice(quantizer.codec, centred(quantizer, x, first), got, want)


def assert_same_choice(codec, x, a, b):
    assert a.arrays["words"].shape == b.arrays["words"].shape
    differ = mx.any(a.arrays["words"] != b.arrays["words"], axis=-1)
    allowed = 0.1 if codec.spec.bits > 6 else 0.02
    assert mx.mean(differ).item() <= allowed
    decoded = [codec.decode(codes, mx.float32) for codes in (a, b)]
    cosines = [cosine(x, y) for y in decoded]
    assert np.abs(cosines[0] - cosines[1]).max() < 5e-7
    assert relative_error(decoded[0], x) == pytest.approx(
        relative_error(decoded[1], x), rel=0.01
    )


def cosine(x, y):
    x, y = (np.array(array, dtype=np.float64) for array in (x, y))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def test_encode_of_zeros_and_of_huge_vectors(launcher):
    codecs = codecs_of("k3v3", (64, 64))
    keys, values = vectors(1, 16, (64, 64))
    k_quantizer, v_quantizer = quantizers_of(codecs, 1, gains=False)
    k = encoded(launcher, k_quantizer, keys * 0, 0)
    v = encoded(launcher, v_quantizer, values * 1e6, 0)
    assert not np.array(k.arrays["scales"]).any()
    assert np.array(v.arrays["scales"]).max() == 65504
    want = k_quantizer.encode(keys * 0)
    assert mx.array_equal(k.arrays["words"], want.arrays["words"]).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_encode_of_model_dtypes(launcher, dtype):
    codecs = codecs_of("k4v4", (64, 64))
    sides = vectors(2, 32, (64, 64), dtype)
    check_encode(launcher, quantizers_of(codecs, 2, 64, page=64), sides, 0)


#: One of each kind; `test_code_order` has the rest.
@pytest.mark.parametrize(
    "spec",
    [
        "k3v2",
        "k3v2.5,codec=trellis",
        "k3v2.5,codec=research.turboangle",
        "k2.5v4,codec=research.turboangle-fixed/rotated-int4",
    ],
)
def test_decode_is_the_definition(spec, launcher):
    """All heads and one, of a buffer with room; means are put back."""
    codecs = codecs_of(spec, (72, 80))
    quantizers = quantizers_of(codecs, 3, 51, page=32)
    for quantizer, x in zip(quantizers, vectors(3, 51, (72, 80)), strict=True):
        codes = with_room(quantizer, x)
        side = CompressedTokens(quantizer, None, codes, x, 16)
        for heads in (slice(0, 3), slice(1, 2)):
            got = Gpu(launcher).decode_rot(side, mx.float32, heads)
            want = quantizer.decode_rot(codes, mx.float32, heads)
            assert (
                got.shape == want.shape == (2, heads.stop - heads.start, 51, x.shape[3])
            )
            assert relative_error(got, want) < 2e-6


#: spec, dims: rotated by kernels and not, whole runs and elementwise.
SIDES = {
    "llama": ("k3v2", (128, 64)),
    "not rotated": ("k4v4", (80, 96)),
    "trellis": ("k3v2.5,codec=trellis", (64, 128)),
    "angles": ("k3v2.5,codec=research.turboangle", (72, 64)),
}


def with_room(quantizer, x):
    """Codes of x in tile order, in a longer buffer."""
    codes = in_tiles(quantizer.codec.encode(x), quantizer.layout)
    tail = [(0, 0), (0, 0), (0, 2), (0, 0)]
    arrays = {name: mx.pad(array, tail) for name, array in codes.arrays.items()}
    return TokenArrays(arrays, codes.length, layout=codes.layout)


def side_with_all(quantizer, x, tokens, sink=3, recent=6, dtype=mx.float32):
    """A handle over x (2, 3, ..): sink, packed and recent tokens, in longer buffers."""
    packed = tokens - sink - recent
    codes = with_room(quantizer, x[:, :, :packed])
    first = mx.contiguous(x[:, :, :sink]).astype(dtype) if sink else None
    return CompressedTokens(quantizer, first, codes, x.astype(dtype), recent)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("case", SIDES)
def test_materialize_is_the_definition(case, dtype, launcher):
    """Sink, codes with means, recent tokens, of all heads and of some; without sink."""
    spec, dims = SIDES[case]
    quantizers = quantizers_of(codecs_of(spec, dims), 3, 51, page=32)
    for quantizer, x in zip(quantizers, vectors(3, 51, dims), strict=True):
        for sink in (3, 0):
            side = side_with_all(quantizer, x, 51, sink, dtype=dtype)
            for heads in (slice(0, 3), slice(1, 2)):
                got = Gpu(launcher).materialize_rot(side, heads, dtype)
                want = Reference().materialize_rot(side, heads, dtype)
                assert got.dtype == want.dtype == dtype
                assert got.shape == want.shape
                assert got.shape == (2, heads.stop - heads.start, 51, x.shape[3])
                bound = {mx.float32: 2e-6, mx.float16: 6e-4, mx.bfloat16: 5e-3}[dtype]
                got, want = got.astype(mx.float32), want.astype(mx.float32)
                assert relative_error(got, want) < bound


def test_materialize_in_every_mode(launcher, mode):
    quantizer = quantizers_of(codecs_of("k3v3", (64, 64)), 3, 51, page=32)[0]
    side = side_with_all(quantizer, vectors(3, 51, (64, 64))[0], 51)
    got = Gpu(launcher).materialize_rot(side, slice(1, 3), mx.float16)
    want = Reference().materialize_rot(side, slice(1, 3), mx.float32)
    assert relative_error(got.astype(mx.float32), want) < 1e-3


@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("dim", [32, 80, 256])
def test_queries_and_outputs_change_basis(dim, gains, launcher):
    """However they lie; three query heads on each of two KV heads."""
    codecs = codecs_of("k3v3", (dim, dim))
    transform = quantizers_of(codecs, 2, gains=gains)[0].transform
    x = mx.random.normal((2, 7, 6, dim, 2))[..., 0].swapaxes(1, 2)
    gpu, reference = Gpu(launcher), Reference()
    for dtype, bound in ((mx.float32, 1e-6), (mx.bfloat16, 4e-3)):
        given = x.astype(dtype) if dtype != x.dtype else x
        for name in ("encode_query", "decode_output"):
            got = getattr(gpu, name)(transform, given)
            want = getattr(reference, name)(transform, given.astype(mx.float32))
            assert got.shape == x.shape
            assert got.dtype == dtype
            assert relative_error(got.astype(mx.float32), want) < bound


@pytest.mark.parametrize("dim", [32, 100, 256])
@pytest.mark.parametrize("centers", [True, False])
def test_channel_gains_are_the_definition(dim, centers, launcher):
    """Of unlike channels, one of them dead, however vectors lie; grouped queries."""
    size = mx.exp(2 * mx.random.normal((2, 2, 1, dim))) * (mx.arange(dim) != 5)
    x = mx.random.normal((2, 40, 2, dim)).swapaxes(1, 2) * size + 3 * size
    q = mx.random.normal((2, 40, 6, dim)).swapaxes(1, 2) / (mx.tile(size, (1, 3, 1, 1)))
    q = mx.where(mx.isfinite(q), q, 0.0)
    for dtype, bound in ((mx.float32, 1e-5), (mx.bfloat16, 1e-5)):
        given, queries = x.astype(dtype)[:, :, 4:36], q.astype(dtype)[:, :, 4:36]
        for asked in (queries, None):
            got = Gpu(launcher).channel_gains(given, centers, asked)
            want = Reference().channel_gains(given, centers, asked)
            assert got.shape == (2, 2, 1, dim)
            assert mx.max(mx.abs(mx.log(got / want))).item() < bound


def test_gains_and_means_in_every_mode(launcher, mode):
    (codec, _) = codecs_of("k4v4", (64, 64))
    x = mx.random.normal((1, 2, 70, 64)) + 3
    gpu, reference = Gpu(launcher), Reference()
    gains = gpu.channel_gains(x[:, :, :40], True, x[:, :, :40])
    want = reference.channel_gains(x[:, :, :40], True, x[:, :, :40])
    assert mx.allclose(gains, want, rtol=1e-5).item()
    transform = ChannelTransform(codec.rotation, want)
    rows = []
    for backend in (gpu, reference):
        quantizer = Quantizer(codec, transform, "keys", PageMeans(32))
        backend.encode(quantizer, x[:, :, :64], 0)
        rows.append(quantizer.means.state["keys"].astype(mx.float32))
    assert rows[0].shape == (1, 2, 2, 64)
    # A sum's order may round a half the other way.
    assert mx.max(mx.abs(rows[0] - rows[1])).item() < 2e-3


def test_decode_in_every_mode(launcher, mode):
    codec = codec_for(tq.CacheSpec.parse("k3v3").values, 128, "values", 0)
    quantizer = Quantizer(codec, ChannelTransform(codec.rotation), "values")
    codes = codec.encode(mx.random.normal((1, 2, 40, 128)))
    codes = in_tiles(codes, quantizer.layout)
    side = CompressedTokens(quantizer, None, codes, mx.zeros((1, 2, 1, 128)), 1)
    got = Gpu(launcher).decode_rot(side, mx.float16, slice(0, 2))
    want = codec.decode(in_vectors(codes), mx.float16)
    assert relative_error(got.astype(mx.float32), want.astype(mx.float32)) < 1e-3


def test_a_whole_cache_through_the_kernels_is_the_same(launcher, monkeypatch):
    """Prefill, steps and a long step: same codes, same attention."""
    mx.random.seed(11)
    k, v = mx.random.normal((1, 2, 330, 64)), mx.random.normal((1, 2, 330, 64))
    q = mx.random.normal((1, 4, 330, 64))
    caches, outputs = [], []
    monkeypatch.setattr(select, "gpu_backend", lambda: None)
    for kernels in (False, True):
        if kernels:
            monkeypatch.setattr(select, "gpu_backend", lambda: Gpu(launcher))
            monkeypatch.setattr(select, "DEFAULT_ON", (launcher.name,))
        cache = tq.TurboQuantCache("k3v4")
        got = []
        for start, stop in ((0, 200), (200, 301), (301, 302), (302, 306), (306, 330)):
            part = slice(start, stop)
            sides = cache.update_and_fetch(k[:, :, part], v[:, :, part])
            mask = "causal" if stop - start > 1 else None
            got.append(attend(q[:, :, part], *sides, 0.125, mask))
        caches.append(cache)
        outputs.append(mx.concatenate(got, axis=2))
    assert relative_error(outputs[1], outputs[0]) < 2e-3
    a, b = (c.keys_and_values() for c in caches)
    for x, y in zip(a, b, strict=True):
        assert y.packed.layout == y.quantizer.layout
        same = x.packed.view("words") == in_vectors(y.packed).arrays["words"]
        assert mx.mean(same).item() > 0.999

"""Encode and decode kernels against their definitions in plain mx.

Encoded words may differ only where the rounding of a sum decides between two choices
that are equally good: codewords whose angles to the vector have the same cosine in
float32. At 7 and 8 bits that happens to some percent of vectors, below to hardly any.
"""

import mlx.core as mx
import numpy as np
import pytest
from helpers import relative_error

import mlx_turboquant as tq
from mlx_turboquant.backends import gpu, reference, select
from mlx_turboquant.codecs import codec_for
from mlx_turboquant.segments import CompressedTokens
from mlx_turboquant.tokens import TokenArrays
from mlx_turboquant.transform import ChannelTransform, PageMeans

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
    "one side": ("k3v3,codec=trellis/research.affine", (64, 64), 1, 11),
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


def surroundings(codecs, heads, pages, page):
    """Bases of unlike channels, and means (2, heads, pages, D) of pages of keys."""
    bases = [
        ChannelTransform(c.rotation, mx.exp(mx.random.normal((2, heads, 1, c.dim)) / 2))
        for c in codecs
    ]
    rows = mx.random.normal((2, heads, pages, codecs[0].dim)).astype(mx.float16)
    return bases, PageMeans(rows, page, pages)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_encode_is_the_definition(case, centered, launcher, mode):
    """Tokens 11 and on of two pages and a part of a third."""
    spec, dims, heads, count = CASES[case]
    codecs = codecs_of(spec, dims)
    keys, values = vectors(heads, count, dims)
    bases, means = surroundings(codecs, heads, -(-(11 + count) // 16), 16)
    args = (keys, values, means if centered else None, 11, bases, codecs)
    check_encode(launcher, args)
    if not centered:
        bases = [ChannelTransform(codec.rotation) for codec in codecs]
        check_encode(launcher, (keys, values, None, 0, bases, codecs))


@pytest.mark.parametrize("case", TRELLISES)
def test_encode_of_a_trellis_is_exact(case, launcher):
    check_trellis(launcher, *TRELLISES[case])


def test_encode_of_a_trellis_in_every_mode(launcher, mode):
    check_trellis(launcher, "k3v2.5,codec=trellis", (64, 32), 1, 9)


def check_trellis(launcher, spec, dims, heads, count):
    codecs = codecs_of(spec, dims)
    keys, values = vectors(heads, count, dims)
    bases, means = surroundings(codecs, heads, -(-(11 + count) // 16), 16)
    args = (keys, values, means, 11, bases, codecs)
    got, want = gpu.Gpu(launcher).encode(*args), reference.encode(*args)
    x = [b.encode(x) for b, x in zip(bases, (keys, values), strict=True)]
    x[0] = x[0] - means.of_tokens(11, count)
    for codec, a, b, y in zip(codecs, got, want, x, strict=True):
        differ = mx.any(a.arrays["words"] != b.arrays["words"], axis=-1)
        # A target may round the other way, where the sums before it were rounded.
        assert mx.sum(differ).item() <= 0.0002 * y.size
        errors = [relative_error(codec.decode(c, mx.float32), y) for c in (a, b)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def check_encode(launcher, args):
    keys, values, means, first, bases, codecs = args
    got = gpu.Gpu(launcher).encode(*args)
    want = reference.encode(*args)
    inputs = [b.encode(x) for b, x in zip(bases, (keys, values), strict=True)]
    if means is not None:
        inputs[0] = inputs[0] - means.of_tokens(first, keys.shape[2])
    for codec, x, a, b in zip(codecs, inputs, got, want, strict=True):
        assert_same_choice(codec, x, a, b)


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
    bases = [ChannelTransform(codec.rotation) for codec in codecs]
    args = (keys * 0, values * 1e6, None, 0, bases, codecs)
    k, v = gpu.Gpu(launcher).encode(*args)
    assert not np.array(k.arrays["scales"]).any()
    assert np.array(v.arrays["scales"]).max() == 65504
    want = reference.encode(*args)[0]
    assert mx.array_equal(k.arrays["words"], want.arrays["words"]).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_encode_of_model_dtypes(launcher, dtype):
    codecs = codecs_of("k4v4", (64, 64))
    keys, values = vectors(2, 32, (64, 64), dtype)
    bases, means = surroundings(codecs, 2, 1, 64)
    check_encode(launcher, (keys, values, means, 0, bases, codecs))


TABLES = {
    "trellis": (1, 1.5, 2, 2.5, 3, 3.5, 4),
    "research.turboangle-fixed": (2.5, 3, 3.5, 4),
    "research.turboangle": (2.5, 3, 4),
    "rotated-int4": (4,),
}
SPECS = [
    *[(f"turboquant:{bits}", d) for bits in range(1, 9) for d in (8, 33, 80, 128)],
    *[
        (f"{name}:{bits}", d)
        for name in TABLES
        for bits in TABLES[name]
        for d in (34, 64)
    ],
]


@pytest.mark.parametrize(("spec", "dim"), SPECS)
def test_decode_is_the_definition(spec, dim, launcher):
    name, _, bits = spec.partition(":")
    codec = codec_for(tq.CodecSpec.of(name, float(bits)), dim, "values", 0)
    x = mx.random.normal((2, 3, 16, dim))
    whole = codec.encode(x)
    codes = TokenArrays(whole.arrays, 13)
    side = CompressedTokens(codec, ChannelTransform(codec.rotation), None, codes, x)
    for heads in (slice(0, 3), slice(1, 2)):
        got = gpu.Gpu(launcher).decode(side, heads, mx.float32)
        want = codec.decode(codes, mx.float32, heads)
        assert got.shape == want.shape == (2, heads.stop - heads.start, 13, dim)
        assert relative_error(got, want) < 2e-6


def test_decode_in_every_mode(launcher, mode):
    codec = codec_for(tq.CacheSpec.parse("k3v3").values, 128, "values", 0)
    codes = codec.encode(mx.random.normal((1, 2, 40, 128)))
    basis = ChannelTransform(codec.rotation)
    side = CompressedTokens(codec, basis, None, codes, mx.zeros((1, 2, 1, 128)))
    got = gpu.Gpu(launcher).decode(side, slice(0, 2), mx.float16)
    want = codec.decode(codes, mx.float16)
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
            monkeypatch.setattr(select, "gpu_backend", lambda: gpu.Gpu(launcher))
            monkeypatch.setattr(select, "TRUSTED", (launcher.name,))
        cache = tq.TurboQuantCache("k3v4")
        got = []
        for start, stop in ((0, 200), (200, 301), (301, 302), (302, 306), (306, 330)):
            part = slice(start, stop)
            sides = cache.update_and_fetch(k[:, :, part], v[:, :, part])
            mask = "causal" if stop - start > 1 else None
            got.append(tq.attend(q[:, :, part], *sides, 0.125, mask))
        caches.append(cache)
        outputs.append(mx.concatenate(got, axis=2))
    assert relative_error(outputs[1], outputs[0]) < 2e-3
    a, b = (c.keys_and_values() for c in caches)
    for x, y in zip(a, b, strict=True):
        same = x.packed.arrays["words"] == y.packed.arrays["words"]
        assert mx.mean(same).item() > 0.999

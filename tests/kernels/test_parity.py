"""Decode attention against float64, over a pruned matrix of everything it takes.

The kernel multiplies in half precision whatever the model's dtype, so its error may be
twice that of the reference at the same dtype, and for float32 models twice that of the
reference in float16: what a GPU does for half-precision models anyway.
"""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers import relative_error, softmax_attention, stored

import mlx_turboquant as tq
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.codecs import codec_for
from mlx_turboquant.kernels.tuning import Tuning
from mlx_turboquant.quantizer import PageMeans, Quantizer
from mlx_turboquant.segments import CompressedTokens
from mlx_turboquant.tiles import in_tiles
from mlx_turboquant.transform import ChannelTransform

AXES = {
    "spec": (
        "k3v3",
        "k4v2",
        "k1v5",
        "k8v6",
        "k2v7",
        "k4v4",
        "k3v2.5,codec=trellis",
        "k4v4,codec=trellis",
        "k2.5v4,codec=research.turboangle-fixed",
        "k3v4,codec=trellis/rotated-int4",
        "k3.5v3,codec=research.turboangle",
    ),
    "dim": (64, 80, 96, 128, 192, 256, 512),
    "group": (1, 2, 4, 7),
    "steps": (1, 2, 5, 8),
    "length": (1, 31, 32, 33, 255, 256, 257),
    "mask": (None, "causal", "bool", "additive", "left padding"),
    "dtype": (mx.float16, mx.bfloat16, mx.float32),
}


def pruned(seed=0):
    """Cases that cover every pair of values of any two axes, found greedily."""
    rng = np.random.default_rng(seed)
    sizes = [len(values) for values in AXES.values()]
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }
    cases = []
    while missing:
        best, gain = None, -1
        for _ in range(60):
            tried = [int(rng.integers(size)) for size in sizes]
            found = sum(
                (a, tried[a], b, tried[b]) in missing
                for a, b in itertools.combinations(range(len(sizes)), 2)
            )
            if found > gain:
                best, gain = tried, found
        missing -= {
            (a, best[a], b, best[b])
            for a, b in itertools.combinations(range(len(sizes)), 2)
        }
        if gain:
            cases.append([v[i] for v, i in zip(AXES.values(), best, strict=True)])
    return cases


PAGE = 96
CASES = [["k3v3", 128, 4, 1, 5000, None, mx.float16], *pruned()]
#: Few query rows have two forms of products: both are held to it, whatever the launcher
#: takes unasked.
FEW_ROWS = [
    ["k3v3", 64, 1, 1, 256, None, mx.float16],
    ["k2v4", 128, 3, 1, 257, "bool", mx.bfloat16],
    ["k4v2", 256, 2, 2, 255, "causal", mx.float16],
    ["k3v3", 256, 4, 1, 33, "additive", mx.float16],
    ["k4v4,codec=trellis", 128, 3, 1, 256, "left padding", mx.float16],
    ["k3v2.5,codec=trellis", 64, 1, 4, 255, "causal", mx.float16],
    ["k2.5v4,codec=research.turboangle-fixed", 128, 2, 1, 257, "bool", mx.float16],
    ["k3.5v3,codec=research.turboangle", 64, 1, 3, 256, "additive", mx.float32],
]
CASES += FEW_ROWS
#: The simulator takes a second for each, and more in its other modes: `make test` has
#: these, `make test-all` all cases in the plain mode, a GPU runs all.
SIMULATED = {"plain": range(len(CASES)), "debug": range(1, 4), "random": range(6, 9)}
EVERY_DAY = {*range(16), *range(len(CASES) - len(FEW_ROWS), len(CASES))}
NUMBERS = [
    pytest.param(number, marks=() if number in EVERY_DAY else pytest.mark.slow)
    for number in range(len(CASES))
]


def made_up(spec, dim, length, dtype):
    sides, parsed = [], tq.CacheSpec.parse(spec)
    for side in ("keys", "values"):
        codec = codec_for(getattr(parsed, side), dim, side, 0)
        x = mx.random.normal((2, 1, length, dim))
        sink = mx.random.normal((2, 1, 3, dim)).astype(dtype)
        recent = mx.random.normal((2, 1, 29, dim)).astype(dtype)  # nine are spare
        gains = mx.exp(mx.random.normal((2, 1, 1, dim)) / 2)
        transform = ChannelTransform(codec.rotation, gains)
        means = None
        if side == "keys":
            means = PageMeans(PAGE)
            means.append(mx.random.normal((2, 1, -(-length // PAGE), dim)))
        quantizer = Quantizer(codec, transform, side, means)
        codes = in_tiles(codec.encode(x), quantizer.layout)
        sides.append(CompressedTokens(quantizer, sink, codes, recent, 20))
    return sides


def mask_of(kind, heads, steps, total):
    if kind == "bool":
        return mx.random.uniform(shape=(steps, total)) > 0.3
    if kind == "additive":
        return mx.random.normal((1, heads, steps, total)).astype(mx.float16)
    if kind == "left padding":
        # Row 0 is whole, row 1 begins after five padding tokens, as in a batch.
        start = mx.array([0, 5]).reshape(2, 1, 1, 1)
        causal = mx.arange(total) <= mx.arange(total - steps, total)[:, None]
        return causal & (mx.arange(total) >= start)
    return kind


@pytest.mark.parametrize("number", NUMBERS)
def test_error_is_at_most_twice_the_references(number, launcher, lane, mode):
    if lane == "simulator" and number not in SIMULATED[mode]:
        pytest.skip("a mode for other cases, or for GPUs")
    case = CASES[number]
    spec, dim, group, steps, length, mask, dtype = case
    keys, values = made_up(spec, dim, length, dtype)
    q = mx.random.normal((2, group, steps, dim)).astype(dtype)
    mask = mask_of(mask, group, steps, length + 23)
    wide = q.astype(mx.float32)
    sides = (stored(keys), stored(values))
    truth = softmax_attention(wide, *sides, dim**-0.5, mask)
    call = AttendCall(q, keys, values, dim**-0.5, mask)
    half = mx.float16 if dtype == mx.float32 else dtype
    if mask is not None and not isinstance(mask, str) and mask.dtype != mx.bool_:
        mask = mask.astype(half)
    plain = Reference().attend(call._replace(q=q.astype(half), mask=mask))
    floor = relative_error(plain.astype(mx.float32), truth)
    for by_fma in (0, 4) if group * steps <= 4 else (None,):
        keys.prepared.clear()
        got = Gpu(launcher, 8, Tuning(fma_rows=by_fma)).attend(call)
        assert got.dtype == dtype
        error = relative_error(got.astype(mx.float32), truth)
        text = f"{case}, {by_fma}: {error:.1e} against {floor:.1e}"
        assert error < 2 * floor, text

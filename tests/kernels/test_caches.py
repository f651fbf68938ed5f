"""Caches that the kernels serve, in tile order, against the CPU's.

What caches do with tiles is tested by ``tests/test_tile_caches.py`` without kernels;
here is where kernels write, read and decode what caches hand them.
"""

import copy
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers import attend, backend, relative_error, stored

import mlx_turboquant as tq
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.tiles import in_tiles, in_vectors

#: What kernels cost beside float32 attention over the same codes: see
#: test_decode_attention.py.
TOLERANCE = 4e-3
SPEC = "k4v4,page=96,window=20"


@pytest.fixture
def gpu(launcher):
    return Gpu(launcher, simdgroups=6)


def texts(count, seed=0):
    """Queries, keys and values of a text, of two KV heads."""
    keys = mx.random.split(mx.random.key(seed), 3)
    shapes = [(1, heads, count, 64) for heads in (4, 2, 2)]
    return [
        mx.random.normal(shape, key=key)
        for shape, key in zip(shapes, keys, strict=True)
    ]


def feed(cache, text, steps, mask=False):
    """Outputs of all tokens of a text, in steps of these sizes."""
    outputs, start = [], 0
    for count in steps:
        q, k, v = (x[:, :, start : start + count] for x in text)
        shown = "causal" if count > 1 else None
        if mask:
            shown = cache.make_mask(count)
        outputs.append(attend(q, *cache.update_and_fetch(k, v), 0.125, shown))
        mx.eval(outputs[-1], cache.state)
        start += count
    assert start == text[0].shape[2]
    return mx.concatenate(outputs, axis=2)


def codes(cache):
    """Codes of keys and of values, in vector order."""
    return [in_vectors(side.packed) for side in cache.compressed()]


def in_tile_order(cache):
    return [side.packed.layout is not None for side in cache.compressed()]


def same_codes(one, other, share=1.0):
    for a, b in zip(codes(one), codes(other), strict=True):
        assert a.length == b.length > 0
        for name, array in a.arrays.items():
            same = mx.all(array == b.arrays[name], axis=-1)
            assert mx.mean(same).item() >= share


@pytest.mark.parametrize(
    "spec", ["k2v2.5,codec=trellis", "k3v4,codec=turboquant/rotated-int4"]
)
def test_kernels_write_the_cpus_codes(spec, gpu, lane):
    """A GPU's sums may round the other way; `test_tokens` counts how often."""
    made = []
    for chosen in (None, gpu):
        with backend(chosen):
            cache = tq.TurboQuantCache(f"{spec},page=32,window=0")
            feed(cache, texts(101), (70, 29, 1, 1))
        made.append(cache)
    cpu, kernels = made
    assert in_tile_order(kernels) == [True, True]
    assert in_tile_order(cpu) == [False, False]
    assert kernels.packed_length == 96
    same_codes(kernels, cpu, 1.0 if lane == "simulator" else 0.95)


@pytest.mark.parametrize("spec", ["k4v3", "k3v2.5,codec=trellis"])
def test_a_state_goes_from_kernels_to_the_cpu_and_back(spec, gpu):
    with backend(gpu):
        saved = tq.TurboQuantCache(f"{spec},page=32,window=4")
        feed(saved, texts(110), (80, 30))
    with backend(None):
        on_cpu = tq.TurboQuantCache.from_state(saved.state)
    with backend(gpu):
        back = tq.TurboQuantCache.from_state(on_cpu.state)
    assert in_tile_order(on_cpu) == [False, False]
    assert in_tile_order(back) == [True, True]
    for name, array in saved.state.items():
        if name != "header":
            assert mx.array_equal(array, back.state[name]).item(), name
    same_codes(on_cpu, saved)
    # A step, a chunk that becomes codes, and steps after it.
    text, steps = texts(44, seed=1), (1, 41, 1, 1)
    outputs = [feed(cache, text, steps) for cache in (saved, back, on_cpu)]
    assert mx.array_equal(outputs[0], outputs[1]).item()
    assert relative_error(outputs[0], outputs[2]) < TOLERANCE
    same_codes(saved, back)
    same_codes(saved, on_cpu, 0.95)


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, 95])
def test_a_trim_into_codes(kept, gpu):
    """Tokens of a cut tile are what they were until they are encoded once more."""
    text, more = texts(150), texts(151 - kept, seed=1)
    made = []
    for chosen in (None, gpu):
        # The CPU's codes for both, so that all that differs is what a trim does.
        with backend(None):
            cache = tq.TurboQuantCache(SPEC)
            feed(cache, text, (149, 1))
        with backend(chosen):
            cache = tq.TurboQuantCache.from_state(cache.state)
            assert cache.trim(150 - 4 - kept) == 146 - kept
            outputs = feed(cache, more, (1, 3, 145 - kept, 1, 1), mask=True)
        made.append((cache, outputs))
    (cpu, want), (kernels, got) = made
    assert in_tile_order(kernels) == [True, True]
    assert kernels.packed_length == cpu.packed_length == 128
    early = slice(0, 4)
    assert relative_error(got[:, :, early], want[:, :, early]) < TOLERANCE
    whole = [
        mx.concatenate([a[:, :, : 4 + kept], b], axis=2)
        for a, b in zip(text, more, strict=True)
    ]
    cut = slice(4 + kept // 32 * 32, 4 + kept)
    for sides in zip(kernels.compressed(), cpu.compressed(), whole[1:], strict=True):
        twice, once, truth = (*map(stored, sides[:2]), sides[2])
        for part, bound in ((cut, 2.0), (slice(cut.stop, None), 1.2)):
            if truth[:, :, part].shape[2]:
                error = relative_error(twice[:, :, part], truth[:, :, part])
                assert error < bound * relative_error(
                    once[:, :, part], truth[:, :, part]
                )


@pytest.mark.parametrize("kept", [0, 40])
def test_a_trimmed_state_goes_from_the_cpu_to_kernels(kept, gpu):
    """The CPU trims to any token; kernels take whole tiles, or none."""
    with backend(None):
        saved = tq.TurboQuantCache(SPEC)
        feed(saved, texts(150), (149, 1))
        saved.trim(146 - kept)
        feed(saved, texts(3, seed=1), (3,))
        state = saved.state
        want = feed(saved, texts(2, seed=2), (1, 1))
    with backend(gpu):
        loaded = tq.TurboQuantCache.from_state(state)
        assert loaded.packed_length == kept // 32 * 32
        got = feed(loaded, texts(2, seed=2), (1, 1))
        feed(loaded, texts(150, seed=3), (149, 1))
    assert relative_error(got, want) < TOLERANCE
    assert loaded.packed_length == (128 if kept == 0 else 160)
    assert in_tile_order(loaded) == [True, True]


def test_copies_go_on_by_themselves(gpu):
    with backend(gpu):
        cache = tq.TurboQuantCache("k4v3,page=32,window=4")
        feed(cache, texts(80), (79, 1))
        twin = copy.deepcopy(cache)
        before = copy.deepcopy(cache)
        outputs = feed(twin, texts(45, seed=1), (1, 43, 1))
        twin.trim(60)
        same_codes(cache, before)
        assert mx.array_equal(
            feed(cache, texts(45, seed=1), (1, 43, 1)), outputs
        ).item()


def test_a_window_forgets_tiles(gpu):
    text, steps, made = texts(170), (100, 1, 1, 60, 1, 7), []
    for chosen in (None, gpu):
        with backend(chosen):
            cache = tq.RotatingTurboQuantCache("k5v5,page=32,window=4,sink=2", 80, 2)
            made.append((feed(cache, text, steps, mask=True), cache))
    (want, cpu), (got, kernels) = made
    assert in_tile_order(kernels) == [True, True]
    assert kernels.packed_length == cpu.packed_length
    assert kernels.packed_length + kernels.sink_length + kernels.recent_length < 170
    assert relative_error(got, want) < TOLERANCE
    same_codes(kernels, cpu, 0.95)


def test_rows_of_a_batch_are_cut_and_taken_out(gpu):
    with backend(gpu):
        rows = []
        for seed, count in enumerate((110, 12, 70)):
            rows.append(tq.TurboQuantCache("k4v4,page=32,window=4"))
            feed(rows[-1], texts(count, seed), (count,))
        batch = tq.TurboQuantCache.merge(rows)
        batch.trim(9)
        batch.filter([2, 0])
        text = [mx.concatenate([x, 1 - x]) for x in texts(2, seed=7)]
        got = attend(text[0], *batch.update_and_fetch(*text[1:]), 0.125, "causal")
        for i, row in enumerate((rows[2], rows[0])):
            row.trim(9)
            want = feed(row, [x[i : i + 1] for x in text], (2,))
            assert relative_error(got[i : i + 1], want) < 1e-6
            same_codes(batch.extract(i), row)
            assert in_tile_order(batch.extract(i)) == [True, True]


def test_arranging_is_the_definition_and_leaves_tiles_alone(gpu):
    """What loading does: of a buffer with room, and of a part of its tokens."""
    with backend(None):
        cache = tq.TurboQuantCache("k3v5,page=32,window=4")
        feed(cache, texts(110), (100, 10))
    for side in cache.compressed():
        assert side.packed.arrays["words"].shape[2] > side.packed_length
        got = gpu.arranged(side.quantizer, side.packed)
        want = in_tiles(side.packed, side.quantizer.layout)
        assert (got.layout, got.length) == (want.layout, want.length)
        for name, array in want.arrays.items():
            assert mx.array_equal(got.arrays[name], array).item()
        assert gpu.arranged(side.quantizer, got) is got


@pytest.mark.parametrize("dim", [16, 64])  # no kernel rotates the first
@pytest.mark.parametrize("has_room", [True, False])
def test_codes_alone_are_attended_to_and_decoded(has_room, dim, gpu):
    """Buffers of no tokens must not be passed: to Metal they would be constants."""
    with backend(gpu):
        cache = tq.TurboQuantCache("k4v4,page=32,window=0,sink=0")
        for count in (64, 1):
            x = mx.random.normal((1, 2, count, dim))
            cache.update_and_fetch(x, -x)
        cache.trim(1)
    sides = cache.compressed()
    assert [(s.packed_length, s.recent_length) for s in sides] == [(64, 0)] * 2
    if not has_room:
        sides = [replace(side, recent=side.recent[:, :, :0]) for side in sides]
    for steps in (1, 12):
        call = AttendCall(mx.random.normal((1, 4, steps, dim)), *sides, 0.25)
        got, want = gpu.attend(call), Reference().attend(call)
        assert relative_error(got, want) < TOLERANCE
    for side in sides:
        got, want = gpu.dequantize(side), Reference().dequantize(side)
        assert relative_error(got, want) < 1e-6

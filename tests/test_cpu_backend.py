"""The CPU backend against the reference backend; encoding: `test_scalar_encode`."""

import mlx.core as mx
import pytest
from cases import each_bits, each_dim
from helpers import relative_error

import mlx_turboquant as tq
from mlx_turboquant.backends import cpu, long_attention
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.cpu import Cpu
from mlx_turboquant.backends.planes import planes_for
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.tokens import TokenArrays


def filled(spec, k_dim, v_dim, tokens=300, heads=2, dtype=mx.float32):
    cache = tq.TurboQuantCache(spec)
    k = mx.random.normal((2, heads, tokens, k_dim)).astype(dtype) + 1
    v = mx.random.normal((2, heads, tokens, v_dim)).astype(dtype)
    cache.update_and_fetch(k[:, :, :-3], v[:, :, :-3])
    return cache.update_and_fetch(k[:, :, -3:], v[:, :, -3:])


@each_bits
def test_every_width_is_the_reference(bits):
    sides = filled(f"k{bits}v{9 - bits}", 64, 80)
    q = mx.random.normal((2, 4, 3, 64))
    call = AttendCall(q, *sides, 0.125, "causal")
    assert relative_error(Cpu().attend(call), Reference().attend(call)) < 2e-6


@each_dim
def test_every_dim_is_the_reference(dim):
    sides = filled("k3v5", dim, dim)
    q = mx.random.normal((2, 6, 1, dim))
    call = AttendCall(q, *sides, 0.1)
    assert relative_error(Cpu().attend(call), Reference().attend(call)) < 2e-6


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["causal", "bool", "additive", None])
@pytest.mark.parametrize("spec", ["k3v3", "k4v3,sink=0,center=off", "k3v4,window=0"])
def test_masks_and_learned_sinks(spec, mask, sinks):
    sides = filled(spec, 64, 64)
    q = mx.random.normal((2, 4, 4, 64))
    if mask == "bool":
        mask = mx.random.uniform(shape=(2, 1, 4, 300)) > 0.3
    elif mask == "additive":
        mask = mx.random.normal((4, 300))
    learned = mx.random.normal((4,)) if sinks else None
    call = AttendCall(q, *sides, 0.125, mask, learned)
    assert relative_error(Cpu().attend(call), Reference().attend(call)) < 2e-6


def test_half_precision_models_keep_their_dtype():
    sides = filled("k3v3", 64, 64, dtype=mx.float16)
    q = mx.random.normal((2, 4, 1, 64)).astype(mx.float16)
    got = Cpu().attend(AttendCall(q, *sides, 0.125))
    wide = Reference().attend(AttendCall(q.astype(mx.float32), *sides, 0.125))
    assert got.dtype == mx.float16
    assert relative_error(got.astype(mx.float32), wide) < 1e-3


def test_what_it_leaves_to_the_reference():
    sides = filled("k16v3", 64, 64)
    quantizers = [side.quantizer for side in sides]
    assert Cpu().refuse(*quantizers) == "codec identity:16 has no planes"
    trellis = tq.TurboQuantCache("k3v3,codec=trellis")
    trellis.update_and_fetch(*[mx.random.normal((1, 1, 200, 64))] * 2)
    quantizer = trellis.compressed()[0].quantizer
    x = mx.random.normal((1, 1, 128, 64))
    got, want = Cpu().encode(quantizer, x, 0), Reference().encode(quantizer, x, 0)
    assert mx.array_equal(got.arrays["words"], want.arrays["words"]).item()


@pytest.mark.parametrize("planes_first", [False, True])
@pytest.mark.parametrize("tokens", [200, 300])
@each_bits
def test_blocks_on_two_streams(bits, tokens, planes_first, monkeypatch):
    """Two and four blocks of unlike lengths, in both orders of the products."""
    monkeypatch.setattr(cpu, "_SHARED", 1)
    monkeypatch.setattr(cpu, "_BLOCK", 100 * 4)
    monkeypatch.setattr(cpu, "prefer_openblas", lambda: planes_first)
    sides = filled(f"k{bits}v{9 - bits}", 64, 80, tokens + 1)
    q = mx.random.normal((2, 4, 2, 64))
    call = AttendCall(q, *sides, 0.125, "causal")
    assert relative_error(Cpu().attend(call), Reference().attend(call)) < 2e-6


def test_blocks_share_the_tokens():
    """Streams take turns, and no product is larger than OpenBLAS leaves to one."""
    codes = TokenArrays({"words": mx.zeros((1, 2, 41_000, 16), mx.uint32)})
    planes = planes_for(4, 128, (1.0, 1.0, 1.0))
    blocks = cpu._blocks(codes, planes, 4)
    spans, streams = zip(*blocks, strict=True)
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert (spans[0].start, spans[-1].stop) == (0, 41_000)
    assert max(s.stop - s.start for s in spans) * 4 * 32 <= cpu._ALONE
    assert len(blocks) % 2 == 0
    assert len(set(streams[::2])) == 1
    assert streams[0] != streams[1] == streams[-1]
    few = TokenArrays({"words": mx.zeros((1, 2, cpu._SHARED // 3 - 1, 16), mx.uint32)})
    assert len({stream for _, stream in cpu._blocks(few, planes, 1)}) == 1


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 queries, the last one shorter."""
    monkeypatch.setattr(long_attention, "_LOGITS", 16 * 2 * 2 * 300)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["causal", "bool", "by head", "row", "additive", None])
@pytest.mark.parametrize("spec", ["k3v3", "k4v3,sink=0,center=off", "k7v1,window=0"])
def test_long_steps_are_the_reference(spec, mask, sinks, small_blocks):
    sides = filled(spec, 64, 80)
    q = mx.random.normal((2, 4, 37, 64))
    shapes = {"bool": (2, 1, 37, 300), "by head": (4, 37, 300), "row": (1, 300)}
    if mask in shapes:
        mask = mx.random.uniform(shape=shapes[mask]) > 0.3
    elif mask == "additive":
        mask = mx.random.normal((37, 300))
    learned = mx.random.normal((4,)) if sinks else None
    call = AttendCall(q, *sides, 0.125, mask, learned)
    assert relative_error(Cpu().attend(call), Reference().attend(call)) < 2e-6


def test_a_chunk_that_is_all_there_is_of_a_block(small_blocks):
    """As many queries as tokens: the first block sees nothing before itself."""
    sides = filled("k3v3", 64, 64)
    q = mx.random.normal((2, 4, 300, 64))
    call = AttendCall(q, *sides, 0.125, "causal")
    assert relative_error(Cpu().attend(call), Reference().attend(call)) < 2e-6


def test_long_steps_of_half_precision_models():
    sides = filled("k3v3", 64, 64, dtype=mx.float16)
    q = mx.random.normal((2, 4, 20, 64)).astype(mx.float16)
    got = Cpu().attend(AttendCall(q, *sides, 0.125, "causal"))
    wide = Reference().attend(AttendCall(q.astype(mx.float32), *sides, 0.125, "causal"))
    assert got.dtype == mx.float16
    assert relative_error(got.astype(mx.float32), wide) < 1e-3

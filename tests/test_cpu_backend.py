"""Decode steps on the CPU: planes of codes against the reference backend."""

import mlx.core as mx
import pytest
from cases import each_bits, each_dim
from helpers import relative_error

import mlx_turboquant as tq
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.cpu import Cpu
from mlx_turboquant.backends.reference import Reference


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
    long = mx.random.normal((2, 4, 9, 64))
    sides = filled("k3v3", 64, 64)
    call = AttendCall(long, *sides, 0.125, "causal")
    assert mx.array_equal(Cpu().attend(call), Reference().attend(call)).item()

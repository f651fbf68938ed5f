"""Decode attention: the real Metal sources against the reference backend.

A kernel decodes levels by polynomials and multiplies in half2, so it differs from the
definition by a few 1e-3, far below what quantization itself costs (0.18 at 3 bits).
"""

import mlx.core as mx
import pytest
from helpers import relative_error, softmax_attention

import mlx_turboquant as tq
from mlx_turboquant.backends import gpu, reference, select
from mlx_turboquant.errors import BackendUnavailableError

TOLERANCE = 4e-3


def filled(spec, length, heads, k_dim, v_dim, dtype=mx.float32, batch=1):
    """Handles after a prefill and a short step; channels differ in size and mean."""

    def made(dim, offset):
        gains = mx.exp(mx.random.normal((batch, heads, 1, dim)))
        x = mx.random.normal((batch, heads, length, dim)) * gains
        return (x + offset * mx.random.normal((batch, heads, 1, dim))).astype(dtype)

    k, v = made(k_dim, 2), made(v_dim, 0)
    cache = tq.TurboQuantCache(spec)
    cache.update_and_fetch(k[:, :, :-3], v[:, :, :-3])
    return cache.update_and_fetch(k[:, :, -3:], v[:, :, -3:])


def mask_of(kind, heads, steps, length):
    if kind == "bool":
        return mx.random.uniform(shape=(steps, length)) > 0.3
    if kind == "additive":
        return mx.random.normal((1, heads, steps, length))
    return kind


#: spec, dims, KV heads, group, L, tokens, mask, learned sinks
CASES = {
    "llama": ("k3v3", (128, 128), 2, 4, 1, 300, None, False),
    "mha": ("k4v3", (64, 64), 2, 1, 1, 333, None, False),
    "one bit": ("k1v1", (64, 32), 1, 2, 1, 200, None, False),
    "two bits": ("k2v2", (64, 32), 1, 2, 1, 200, None, False),
    "five bits": ("k5v4", (64, 32), 1, 2, 1, 200, None, False),
    "tables": ("k6v7", (64, 32), 1, 2, 1, 200, None, False),
    "eight bits": ("k8v8", (64, 64), 1, 2, 1, 200, None, False),
    "dims 80 and 96": ("k3v2", (80, 96), 2, 3, 1, 300, None, False),
    "dim 72": ("k3v3", (72, 72), 1, 2, 3, 300, "bool", False),
    "dims 192 and 128": ("k3v4", (192, 128), 1, 2, 2, 300, "causal", False),
    "dim 256": ("k5v5", (256, 256), 1, 1, 1, 300, None, False),
    "dim 512": ("k3v3", (512, 512), 1, 2, 1, 200, None, False),
    "eight rows": ("k3v3", (128, 128), 2, 2, 8, 300, "causal", False),
    "mask and sinks": ("k3v3", (128, 64), 2, 2, 4, 300, "additive", True),
    "trellis": ("k3v3,codec=trellis", (128, 128), 2, 4, 1, 300, None, False),
    "two trellises": ("k4v3.5,codec=trellis", (64, 96), 1, 2, 2, 300, "causal", False),
    "low rates": ("k1v1.5,codec=trellis", (64, 64), 1, 2, 1, 300, None, False),
    "more low rates": ("k2v2.5,codec=trellis", (80, 64), 1, 2, 1, 300, None, False),
    "pairs": (
        "k3v3,codec=research.turboangle-fixed",
        (128, 64),
        1,
        2,
        1,
        300,
        None,
        False,
    ),
    "two kinds": (
        "k3.5v4,codec=research.turboangle-fixed/trellis",
        (72, 64),
        1,
        2,
        1,
        300,
        None,
        False,
    ),
    "angles": (
        "k3.5v3,codec=research.turboangle",
        (128, 128),
        1,
        4,
        1,
        300,
        None,
        False,
    ),
    "more angles": (
        "k4v2.5,codec=research.turboangle",
        (72, 80),
        2,
        2,
        2,
        200,
        "causal",
        False,
    ),
    "mixed": (
        "k3.5v3,codec=research.turboangle/trellis",
        (64, 64),
        1,
        2,
        1,
        200,
        None,
        False,
    ),
    "int4": ("k4v4,codec=rotated-int4", (64, 64), 1, 2, 1, 300, None, False),
    "nothing centred": ("k4v4,sink=0,center=off", (64, 64), 2, 2, 1, 300, None, True),
    "one token packed": (
        "k4v4,page=32,window=0,sink=4",
        (64, 64),
        1,
        2,
        1,
        39,
        None,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case, launcher, mode):
    spec, dims, heads, group, steps, length, kind, learned = CASES[case]
    keys, values = filled(spec, length, heads, *dims)
    q = mx.random.normal((1, heads * group, steps, dims[0]))
    mask = mask_of(kind, heads * group, steps, length)
    sinks = mx.random.normal((heads * group,)) if learned else None
    assert gpu.refuse(keys, values) is None
    args = (q, keys, values, dims[0] ** -0.5, mask, sinks)
    got = gpu.Gpu(launcher, simdgroups=6).attend(*args)
    assert relative_error(got, reference.attend(*args)) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_models_and_batches(launcher, dtype):
    keys, values = filled("k4v4", 300, 2, 64, 64, dtype, batch=2)
    q = mx.random.normal((2, 4, 2, 64)).astype(dtype)
    args = (q, keys, values, 0.125, "causal")
    got = gpu.Gpu(launcher).attend(*args)
    assert got.dtype == dtype
    wide = reference.attend(q.astype(mx.float32), *args[1:])
    floor = 0.004 if dtype == mx.bfloat16 else 0
    assert relative_error(got.astype(mx.float32), wide) < TOLERANCE + floor


@pytest.mark.parametrize("blocks", [1, 2, 5, 64])
def test_the_number_of_blocks_changes_nothing(launcher, blocks):
    keys, values = filled("k4v4", 500, 1, 64, 64)
    q = mx.random.normal((1, 2, 1, 64))
    one = gpu.Gpu(launcher, simdgroups=6).attend(q, keys, values, 0.125)
    other = gpu.Gpu(launcher, simdgroups=blocks).attend(q, keys, values, 0.125)
    assert relative_error(other, one) < 2e-3


def test_error_falls_with_every_bit(launcher):
    errors = []
    for bits in range(1, 7):
        mx.random.seed(5)
        k, v = (mx.random.normal((1, 1, 300, 64)) for _ in range(2))
        cache = tq.TurboQuantCache(f"k{bits}v{bits}")
        cache.update_and_fetch(k[:, :, :290], v[:, :, :290])
        keys, values = cache.update_and_fetch(k[:, :, 290:], v[:, :, 290:])
        q = mx.random.normal((1, 2, 1, 64))
        got = gpu.Gpu(launcher).attend(q, keys, values, 0.2)
        errors.append(relative_error(got, softmax_attention(q, k, v, 0.2)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_refusals_are_words():
    keys, values = filled("k16v3", 200, 1, 64, 64)
    assert "identity:16 has no kernel" in gpu.refuse(keys, values)
    keys, values = filled("k3v3", 200, 1, 576, 64)
    assert "head_dim 576 is over 512" in gpu.refuse(keys, values)
    keys, values = filled("k3v3,page=48", 200, 1, 64, 64)
    assert "page 48 is not a multiple of 32" in gpu.refuse(keys, values)
    cache = tq.TurboQuantCache("3")
    cache.update_and_fetch(mx.ones((1, 1, 5, 64)), mx.ones((1, 1, 5, 64)))
    assert "nothing is packed" in gpu.refuse(*cache.keys_and_values())


def test_choice_of_backend_is_shown_and_can_be_forced(launcher, monkeypatch):
    monkeypatch.setattr(select, "gpu_backend", lambda: None)
    cache = tq.TurboQuantCache("k4v4")
    kv = mx.random.normal((1, 2, 300, 64))
    cache.update_and_fetch(kv, kv)
    sides = cache.update_and_fetch(kv[:, :, :1], kv[:, :, :1])
    q = mx.random.normal((1, 4, 1, 64))
    on_cpu = tq.attend(q, *sides, 0.125)
    assert tq.explain(cache).layers[0].backend == "cpu"
    monkeypatch.setattr(select, "gpu_backend", lambda: gpu.Gpu(launcher))
    monkeypatch.setattr(select, "TRUSTED", ())
    plain = tq.attend(q, *sides, 0.125)
    assert relative_error(on_cpu, plain) < 1e-6
    assert "try MLX_TQ_BACKEND=gpu" in tq.explain(cache).layers[0].backend
    monkeypatch.setattr(select, "TRUSTED", (launcher.name,))
    assert tq.explain(cache).layers[0].backend == launcher.name
    fused = tq.attend(q, *sides, 0.125)
    assert 0 < relative_error(fused, plain) < TOLERANCE
    monkeypatch.setenv(select.VARIABLE, "reference")
    assert mx.array_equal(tq.attend(q, *sides, 0.125), plain).item()
    monkeypatch.setenv(select.VARIABLE, "gpu")
    assert mx.array_equal(tq.attend(q, *sides, 0.125), fused).item()
    identity = tq.TurboQuantCache("k16v4")
    identity.update_and_fetch(kv, kv)
    identity.update_and_fetch(kv[:, :, :1], kv[:, :, :1])
    with pytest.raises(BackendUnavailableError, match=r"identity.* has no kernel"):
        tq.attend(q, *identity.keys_and_values(), 0.125)
    monkeypatch.setenv(select.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        tq.attend(q, *sides, 0.125)

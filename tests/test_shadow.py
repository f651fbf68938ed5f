"""The first real step of proved kernels is compared; if it is wrong, it is the last."""

import re
import warnings

import mlx.core as mx
import pytest
from helpers import attend
from proof_caches import backend_of, cache_of, grow

from mlx_turboquant.backends import proved
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.backends.shadow import Shadow
from mlx_turboquant.proof.ledger import Ledger


def test_the_first_real_step_is_compared_and_no_other(a_proved_mac):
    gpu, ledger = a_proved_mac
    cache = cache_of(tokens=300)
    kinds = ["encode", "encode", "prepare", "step", "step"]
    assert gpu.used == kinds
    digest = cache.choice.proof
    shadow = proved.shadow_of(gpu, digest)
    shadow.wait()
    assert cache.choice.backend is shadow.backend
    assert shadow.backend.watch is None
    assert "attend" not in vars(shadow.backend)
    grow(cache, 1, 1)
    another = cache_of()
    assert another.choice.backend is shadow.backend
    assert gpu.used == [*kinds, "step", "step", *kinds[:-1]]
    assert ledger.found(digest).is_ok
    assert gpu.watch is None


def test_a_real_step_that_is_wrong_ends_the_use_of_kernels(a_proved_mac):
    gpu, ledger = a_proved_mac
    gpu.factor = 1.05
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = cache_of(tokens=300)
        digest = cache.choice.proof
        proved.shadow_of(gpu, digest).wait()
        grow(cache, 1)
        another = cache_of()
    (line,) = (str(warning.message) for warning in said)
    reason = (
        r"gave wrong results here \(the first step: error 0.0\d+ and 0.0\d+ of a row"
    )
    assert re.match(f"tq: its kernels {reason}, over 0.01 or 0.04", line)
    # At once, and in the order that the codes have.
    used = list(gpu.used)
    shown = backend_of(cache)
    assert re.match(f"reference: its kernels {reason}", shown)
    grow(cache, 1)
    assert gpu.used == used
    assert None not in {side.layout for side in cache._tokens.packed}
    # With the next page in the order of the reference.
    grow(cache, 128, 1)
    assert {side.layout for side in cache._tokens.packed} == {None}
    assert gpu.used == used
    assert backend_of(another).startswith("reference: its kernels gave wrong")
    stored = ledger.store.read(digest)
    assert stored.status == "wrong"
    assert stored.checks == 33
    key = proved.key_of(gpu, *cache._quantizers.sides, mx.float16)
    with pytest.warns(UserWarning, match="the first step"):
        assert not Ledger(ledger.store).standing(key).is_ok


def test_no_step_is_compared_in_a_transformation(a_proved_mac):
    gpu, _ = a_proved_mac
    cache = cache_of(tokens=300)
    shadow = proved.shadow_of(gpu, cache.choice.proof)
    shadow.wait()
    shadow.backend.watch = shadow._see  # as before the first step
    shadow._thread = None
    cache._prepared.clear()
    keys, values = cache.compressed()
    q = mx.random.normal((1, 2, 1, 64)).astype(mx.float16)
    mx.eval(mx.compile(lambda q: attend(q, keys, values, 0.1))(q))
    assert shadow._thread is None
    assert shadow.backend.watch is not None
    cache._prepared.clear()
    mx.eval(attend(q, *cache.compressed(), 0.1))
    assert shadow._thread is not None
    assert shadow.backend.watch is None


def test_rows_that_see_nothing_and_models_that_overflow_blame_no_kernel(a_proved_mac):
    gpu, _ = a_proved_mac
    cache = cache_of(tokens=300)
    keys, values = cache.compressed()
    kv = mx.random.normal((1, 2, 2, 64)).astype(mx.float16)
    told = []

    def judged(step, mask=None, q=kv):
        shadow = Shadow(gpu, told.append)
        shadow._see(AttendCall(q, keys, values, 0.1, mask), step)
        shadow.wait()
        return len(told)

    def right(call):
        return Reference().attend(call)

    nothing = mx.broadcast_to(mx.array([[False], [True]]), (2, keys.shape[2]))
    additive = mx.where(nothing, 0, -mx.inf).astype(mx.float16)

    def zeros(call):
        return right(call) * mx.array([0, 1]).reshape(1, 1, 2, 1).astype(mx.float16)

    assert judged(right) == 0
    assert judged(zeros, nothing) == 0
    assert judged(zeros, additive) == 0
    assert judged(right, q=kv * mx.inf) == 0
    assert judged(lambda call: right(call) * mx.nan) == 1
    assert judged(zeros) == 2
    assert judged(lambda call: zeros(call) * 1.05, nothing) == 3

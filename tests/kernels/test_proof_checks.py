"""Checks of a proof, on kernels: all hold, and what is otherwise is seen and named."""

import re

import mlx.core as mx
import numpy as np
import pytest

import mlx_turboquant as tq
from mlx_turboquant.backends import select
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.geometry import machine_simdgroups
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.backends.shadow import Shadow
from mlx_turboquant.backends.shadow import _errors as shadow_errors
from mlx_turboquant.backends.truth import tolerance_of
from mlx_turboquant.proof import checks, runner
from mlx_turboquant.proof.facts import WORDS, facts
from mlx_turboquant.proof.judge import WrongError
from mlx_turboquant.proof.key import Subject
from mlx_turboquant.proof.runner import Job


def test_facts_hold(launcher, mode):
    found = facts(launcher)
    assert len({fact.name for fact in found}) == len(found) == 21
    assert [str(fact) for fact in found if not fact.holds] == []
    assert WORDS * 4 == 28672
    # The simulator is one of the machines that kernels must get on with.
    kept = {fact.found == "kept" for fact in found if not fact.is_needed}
    assert len(kept) == 1


def test_the_largest_threadgroup_memory_is_no_more_than_is_probed():
    """Of the search for trellis codes, whose steps, branches and costs are there."""
    from mlx_turboquant.backends.code_launches import _searches_of

    for count in (32, 64, 96, 128, 256, 512):
        simdgroups, vectors = _searches_of(count)
        floats = simdgroups * (count * vectors * 5 + 2 * 128)
        assert 4 * floats <= 4 * WORDS <= 32 << 10


#: What a machine does otherwise, and the facts that say so.
FAULTS = {
    "simdgroups of 64": ([8], None, 64, "threads of a simdgroup"),
    "lanes in another order": ([0], None, 5, "lane of a thread"),
    "simdgroups in another order": ([1], None, 2, "simdgroup of a thread"),
    "a wrong maximum": ([9], None, 30, "simd_max"),
    "a vote of one is lost": ([10], None, 0, "simd_any"),
    "a shuffle of nearly everything": ([11], None, 9, "simd_shuffle"),
    "a butterfly over too few": ([16], None, 3, "simd_shuffle_xor 16"),
    "threadgroup memory is too small": ([2], None, 1, "threadgroup memory of 28672"),
    "subnormal halves are flushed": ([3], None, 0, "halves as floats"),
    "rounding is to zero": ([4], None, 1, "floats as halves"),
    "exp2 is rough": ([5], None, 1.001, "exp2"),
    "fragments lie otherwise": (None, (0, 0), 7, "lanes of fragments, logits"),
    "weights lie otherwise": (None, (0, 1), 7, "lanes of fragments, values"),
    "sums are halves": (None, (1, 0), 1, "sums of products, logits"),
    "sums of values are halves": (None, (3, 1), 2048, "sums of products, values"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_machine_that_is_otherwise_is_told(name, launcher):
    fact, product, wrong, expected = FAULTS[name]

    class Otherwise:
        name = "otherwise"

        def __call__(self, launch, inputs):
            lanes, products = (np.array(x) for x in launcher(launch, inputs))
            if fact is not None:
                lanes[fact] = wrong
            else:
                products[product] = wrong
            return [mx.array(lanes), mx.array(products)]

    told = [fact for fact in facts(Otherwise()) if not fact.holds]
    assert [fact.name.startswith(expected) for fact in told] == [True]
    assert told[0].found != told[0].expected

    subject = Subject("turboquant:3", "turboquant:2", 64, 64, 128, "float16", "")
    noted = []
    first = next(checks.all_checks(subject, Otherwise(), noted.append))
    with pytest.raises(WrongError, match=f"{told[0].name}: expected .* found"):
        first.run(Reference())
    assert len(noted) == 21


def test_fragments_that_are_exchanged_are_named(launcher):
    """Two lanes that have each other's elements."""

    class Exchanged:
        name = "exchanged"

        def __call__(self, launch, inputs):
            lanes, products = (np.array(x) for x in launcher(launch, inputs))
            products[:, 0, :, [0, 1]] = products[:, 0, :, [1, 0]]
            return [mx.array(lanes), mx.array(products)]

    (told,) = [fact for fact in facts(Exchanged()) if not fact.holds]
    assert told.found.startswith("(0, 2) for (0, 0) as element 0 of lane 0, ")
    assert "8 wrong in all" in told.found


def results_of(backend, subject):
    """Error or complaint of every check but the longest."""
    results = {}
    for check in checks.all_checks(subject, None, None):
        if "5000 tokens" not in check.name:
            try:
                results[check.name] = check.run(backend)
            except WrongError as wrong:
                results[check.name] = str(wrong)
    return results


class OnePercentOff(Gpu):
    def attend(self, call):
        return super().attend(call) * 1.01

    def encode(self, quantizer, x, first):
        codes = super().encode(quantizer, x, first)
        codes.arrays["scales"] = codes.arrays["scales"] * 1.01
        return codes


def test_one_percent_cannot_hide_behind_bfloat16(launcher):
    """Vectors that MLX rotates come to kernels with 8 bits; the truth has the same."""
    subject = Subject("turboquant:3", "turboquant:2", 96, 96, 128, "bfloat16", "")
    right = results_of(Gpu(launcher), subject)
    assert all(isinstance(error, float) for error in right.values()), right
    wrong = results_of(OnePercentOff(launcher), subject)
    blamed = {name for name, found in wrong.items() if isinstance(found, str)}
    attention = {n for n in right if n.startswith(("attention", "matrix", "multiply"))}
    assert blamed == attention | {"codes of keys", "codes of values"}
    assert len(blamed) == 17


@pytest.mark.parametrize("dims", [(64, 64), (96, 128)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_whole_proof_in_a_process_of_its_own(dims, dtype, lane, tmp_path):
    if lane == "simulator" and (dims, dtype) != ((64, 64), "float16"):
        pytest.skip("the simulator takes its time; these are for GPUs")
    simulated = lane == "simulator"
    subject = Subject("turboquant:3", "turboquant:2", *dims, 128, dtype, "")
    backend = "proof_fakes:simulated" if simulated else ""
    dialect = "metal" if simulated else lane
    job = Job(subject, dialect, machine_simdgroups(dialect), backend)
    verdict = runner.run(job, tmp_path / "log", 120)
    assert verdict.is_ok, verdict
    print(f"{subject} on {lane}: {verdict.history}; {verdict.errors}")
    assert verdict.checks == 34
    assert 0 < verdict.errors["attention"] < 5e-3
    assert verdict.facts["threads of a simdgroup"] == "32"
    assert len(verdict.facts) == 21


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("dims", [(64, 64), (96, 80)])
@pytest.mark.parametrize("mask", [None, "blocks"])
def test_a_step_of_a_cache_agrees_with_its_shadow(
    dims, dtype, mask, launcher, monkeypatch
):
    gpu = Gpu(launcher, 64)
    monkeypatch.setattr(select, "gpu_backend", lambda: gpu)
    monkeypatch.setattr(select, "requested", lambda: "gpu")
    cache = tq.TurboQuantCache("k3v2")
    for tokens in (300, 2):
        kv = [mx.random.normal((1, 2, tokens, d)).astype(dtype) for d in dims]
        keys, values = cache.update_and_fetch(*kv)
    q = mx.random.normal((1, 8, 2, dims[0])).astype(dtype)
    if mask is not None:
        mask = mx.random.uniform(shape=(1, 1, 2, keys.shape[2])) < 0.5
    call = AttendCall(q, keys, values, dims[0] ** -0.5, mask)
    told = []
    shadow = Shadow(gpu, told.append)
    out = shadow.backend.attend(call)
    shadow.wait()
    assert shadow._thread is not None
    assert not told
    of_all, of_row, is_known = shadow_errors(call, out).tolist()
    assert is_known
    assert of_all < tolerance_of(call)
    assert of_row < 3 * tolerance_of(call)
    of_all, *_ = shadow_errors(call, out * 1.01).tolist()
    assert of_all > tolerance_of(call)
    shadow.backend.prepare = lambda call: lambda call: out * 1.03
    shadow.backend.watch = shadow._see
    call.keys.prepared.clear()
    shadow.backend.attend(call)
    shadow.wait()
    assert re.match(r"the first step: error 0\.0[23]\d* and 0\.0", told[0])

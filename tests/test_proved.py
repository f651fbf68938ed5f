"""Caches use kernels that were proved, say so, and stop if a real step is wrong."""

import re
import warnings

import mlx.core as mx
import pytest
from helpers import attend, relative_error

import mlx_turboquant as tq
from mlx_turboquant.backends import proved, select
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.backends.shadow import Shadow
from mlx_turboquant.cache.quantizers import quantizers_of
from mlx_turboquant.proof.ledger import Ledger
from mlx_turboquant.proof.store import Verdict
from mlx_turboquant.tiles import in_tiles


@pytest.fixture
def a_mac(verdicts, monkeypatch):
    """Caches find Metal here, with kernels whose check is told what to find."""

    class Metal(Gpu):
        """Computes as the reference, and knows what it was asked."""

        def __init__(self):
            super().__init__(type("Launcher", (), {"name": "metal"})(), simdgroups=8)
            self.used, self.factor = [], 1

        def encode(self, quantizer, x, first):
            self.used.append("encode")
            return self.arranged(quantizer, quantizer.encode(x, first))

        def arranged(self, quantizer, codes):
            return in_tiles(codes, quantizer.layout)

        def prepare(self, call):
            self.used.append("prepare")

            def step(call):
                self.used.append("step")
                return self.factor * Reference().attend(call)

            return step

        def channel_gains(self, x, centers=False, queries=None):
            return Reference().channel_gains(x, centers, queries)

    proved.shadow_of.cache_clear()
    gpu, ledger = Metal(), Ledger(verdicts)
    monkeypatch.setattr(select, "gpu_backend", lambda: gpu)
    monkeypatch.setattr(proved, "this_ledger", lambda: ledger)
    monkeypatch.delenv(select.VARIABLE, raising=False)
    select.requested.cache_clear()

    def finds(fake):
        monkeypatch.setattr(proved, "STAND_IN", f"proof_fakes:{fake}")
        return gpu, ledger

    yield finds
    ledger.close()
    select.requested.cache_clear()


@pytest.fixture
def a_proved_mac(a_mac):
    """The same, where ``k3v2`` of 64 elements was proved before."""
    gpu, ledger = a_mac("no_such_fake")
    sides = quantizers_of(tq.CacheSpec.parse("k3v2"), (64, 64), mx.float16)
    key = proved.key_of(gpu, *sides, mx.float16)
    ledger.store.write(key.digest, Verdict("ok", "k3v2", checks=33, seconds=3.2))
    return gpu, ledger


def grow(cache, *steps):
    """Attention of each step."""
    outs = []
    for tokens in steps:
        kv = mx.random.normal((1, 2, tokens, 64)).astype(mx.float16)
        outs.append(attend(kv, *cache.update_and_fetch(kv, kv), 0.1))
    return outs


def cache_of(spec="k3v2", tokens=400):
    cache = tq.TurboQuantCache(spec)
    grow(cache, tokens, 1)
    return cache


def backend_of(cache):
    return tq.explain(cache).layers[0].backend


def test_caches_use_kernels_once_they_are_proved(a_mac):
    gpu, ledger = a_mac("right")
    first = cache_of()
    assert backend_of(first).startswith("reference: its kernels are being checked")
    assert not gpu.used
    (verdict,) = ledger.wait()
    shown = backend_of(cache_of())
    assert re.fullmatch(
        r"metal: proved 20..-..-.. ..:.., 33 checks in \d+\.\d s, largest error \S+",
        shown,
    )
    assert verdict.history in shown
    assert gpu.used
    assert backend_of(cache_of("k16v4")) == "reference: codec identity:16 has no kernel"


def test_a_cache_that_did_not_wait_changes_over_at_its_next_page(a_mac):
    gpu, ledger = a_mac("right")
    cache, other = tq.TurboQuantCache("k3v2"), tq.TurboQuantCache("k3v2")
    for c in (cache, other):
        mx.random.seed(3)
        grow(c, 400, 1)
    assert backend_of(cache).startswith("reference")
    layouts = {side.layout for side in cache._tokens.packed}
    assert layouts == {None}
    cache.trim(100)  # a page is cut
    grow(cache, 101)
    ledger.wait()
    grow(cache, 1)
    assert backend_of(cache).startswith("reference")  # until a page is due
    assert not gpu.used
    grow(cache, 128, 1)
    assert backend_of(cache).startswith("metal: proved")
    assert None not in {side.layout for side in cache._tokens.packed}
    assert gpu.used[-2:] == ["step", "step"]  # one of them for its shadow
    # What was packed before is what it was.
    mx.random.seed(9)
    (out,) = grow(cache, 1)
    want = Reference().attend
    vars(cache._backend)["attend"] = want
    cache.trim(1)
    mx.random.seed(9)
    assert relative_error(out, grow(cache, 1)[0]) < 1e-6


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


def test_caches_say_why_kernels_are_not_used(a_mac):
    gpu, ledger = a_mac("one_percent_off")
    cache_of()
    ledger.wait()
    with pytest.warns(UserWarning, match="tq: its kernels gave wrong results here"):
        cache = cache_of()
    shown = backend_of(cache)
    assert "gave wrong results here (matrix products" in shown
    assert "log: " in shown
    assert not gpu.used


def test_the_variable_goes_without_proof(a_mac, monkeypatch, counted):
    gpu, _ = a_mac("one_percent_off")
    for value, name in (("gpu", "metal"), ("reference", "reference: MLX_TQ_BACKEND")):
        monkeypatch.setenv(select.VARIABLE, value)
        select.requested.cache_clear()
        assert backend_of(cache_of()).startswith(name)
    assert gpu.used
    assert not counted


def test_cuda_needs_no_proof(a_mac, counted):
    gpu, _ = a_mac("one_percent_off")
    gpu.launcher.name = "cuda"
    assert backend_of(cache_of()) == "cuda"
    assert not counted


def test_codecs_of_others_are_not_checked(a_mac, monkeypatch, counted):
    from mlx_turboquant.codecs.turboquant import TurboQuant

    a_mac("right")
    monkeypatch.setattr(TurboQuant, "__module__", "someone.elses")
    assert "would not know codec turboquant:3" in backend_of(cache_of())
    assert not counted


def test_proofs_begin_with_the_caches_of_a_model(a_mac, books):
    from mlx_turboquant.integrations import proofs

    model, tokenizer = books
    _, ledger = a_mac("right")
    tq.make_prompt_cache(model, "k3v3")
    assert ledger.is_busy
    said = []
    proofs.wait(said.append)
    assert said[0].startswith("Checking the kernels")
    assert ": ok, 33 checks" in said[1]
    proofs.wait(said.append)
    assert len(said) == 2
    cache = tq.make_prompt_cache(model, "k3v3")
    model(mx.array([tokenizer.encode("It was ") * 100]), cache=cache)
    model(mx.array([[1]]), cache=cache)
    assert backend_of(cache).startswith("metal: proved")


def test_doctor_shows_verdicts_and_forgets_them(a_mac, monkeypatch):
    from typer.testing import CliRunner

    from mlx_turboquant import diagnosis
    from mlx_turboquant.cli.app import main

    _, ledger = a_mac("right")
    monkeypatch.setattr(diagnosis, "CASES", diagnosis.CASES[:1])
    old = Verdict("crash", "an older one", "why", log="/the/log")
    ledger.store.write("0" * 24, old)

    def doctor(*options):
        done = CliRunner().invoke(main, ["doctor", "--tokens", "600", *options])
        return done.exit_code, done.output

    code, out = doctor()
    assert code == 0, out
    new = r"^kernels for turboquant:3 .*: ok \(2.*, 33 checks in .*, largest error"
    assert re.search(new, out, re.M)
    older = r"^kernels for an older one: crash \(.*\) why; log: /the/log"
    assert re.search(older, out, re.M)
    assert re.search(r"k3v3 on metal +\S+ ms", out)
    code, out = doctor("--retry")
    assert "forgot 2 verdicts" in out
    assert "older" not in out

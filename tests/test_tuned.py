"""What a tuner found: proved, kept beside the verdict, used by later processes."""

import dataclasses
import json
import re

import mlx.core as mx
import proof_caches
import pytest

from mlx_turboquant.backends import proved, select
from mlx_turboquant.cache.quantizers import quantizers_of
from mlx_turboquant.errors import SpecError, UnsupportedModelError
from mlx_turboquant.kernels.tuning import UNTUNED, Heads, Tuning
from mlx_turboquant.proof.key import Key, Subject
from mlx_turboquant.proof.ledger import Ledger
from mlx_turboquant.proof.runner import Job
from mlx_turboquant.proof.store import Store, Verdict
from mlx_turboquant.proof.tuned import Tuned
from mlx_turboquant.spec import CacheSpec

SUBJECT = Subject("turboquant:3", "turboquant:2", 64, 64, 128, "float16", "")
KEY = Key(SUBJECT, {"device": "none"}, "")
PROVED = Verdict("ok", str(SUBJECT), checks=33, seconds=1.5)
FOUND = Tuned(
    Heads(8, 4),
    Tuning(simdgroups=2, fill=1.5),
    {"4096": (40.0, 36.0), "32768": (200.0, 160.0)},
    tried=13,
    seconds=3.25,
)


@pytest.fixture
def verdicts(tmp_path):
    return Store(tmp_path / "proofs")


def tune(store, fake, heads=(1, 2)):
    """What a new process' tuner comes to."""
    job = Job(SUBJECT, "metal", 8, f"proof_fakes:{fake}", Heads(*heads))
    return Ledger(store).tune(KEY, job)


def test_what_is_fastest_is_checked_and_kept(verdicts):
    verdicts.write(KEY.digest, PROVED)
    verdict = tune(verdicts, "tunable")
    (found,) = verdict.tuned
    assert found.tuning.few_tokens == 128, found
    assert found.heads == (1, 2)
    for base, best in found.us.values():
        assert best < 0.8 * base
    assert dataclasses.replace(verdict, tuned=()) == PROVED
    assert Store(verdicts.folder).read(KEY.digest) == verdict
    log = verdicts.path(KEY.digest).with_suffix(".tuner.log").read_text()
    names = re.findall(r'"name": "([^"]+)', log)
    assert names[:2] == ["the tuner's start", "tuning: few_tokens 128"]
    assert names[-1] == "attention over 5000 tokens, 8 rows, decades"
    timed = re.findall(r"^.* -> .* us at 32768 .*$", log, re.M)
    assert len(timed) > found.tried
    assert verdicts.forget() == 1
    assert [path.name for path in verdicts.folder.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("tuned_is_wrong", r"^wrong: matrix products: 8 rows, .*: error 0\.0"),
        (
            "tuned_crashes",
            r"^crash: the process ended with -11 at tuning: .*few_t",
        ),
        ("no_such_fake", r"^unknown: the checking process ended with 1"),
    ],
)
def test_a_tuner_that_fails_leaves_the_verdict(fake, reason, verdicts):
    """What was found before for these heads is replaced, that for others is not."""
    before = dataclasses.replace(FOUND, heads=Heads(1, 2))
    verdicts.write(KEY.digest, dataclasses.replace(PROVED, tuned=(FOUND, before)))
    verdict = tune(verdicts, fake)
    assert verdict.is_ok
    kept, failed = verdict.tuned
    assert kept == FOUND
    assert failed.tuning == UNTUNED
    assert re.search(reason, failed.reason), failed.reason
    assert verdicts.read(KEY.digest) == verdict


def test_only_what_is_proved_is_tuned(verdicts):
    assert tune(verdicts, "tunable") is None
    crashed = Verdict("crash", "x")
    verdicts.write(KEY.digest, crashed)
    assert tune(verdicts, "tunable") == crashed


def test_old_verdicts_and_rubbish(verdicts):
    whole = dataclasses.replace(PROVED, tuned=(FOUND,))
    verdicts.write(KEY.digest, whole)
    assert verdicts.read(KEY.digest) == whole
    fields = json.loads(verdicts.path(KEY.digest).read_text())
    old = {name: value for name, value in fields.items() if name != "tuned"}
    verdicts.path(KEY.digest).write_text(json.dumps(old))
    assert verdicts.read(KEY.digest) == PROVED
    (one,) = fields["tuned"]
    for name, rubbish in (
        ("heads", 8),
        ("us", [1]),
        ("us", {"4096": 1.0}),
        ("tuning", {"simdgroups": 64}),
        ("tuning", {"waves": 2}),
        ("tuning", None),
    ):
        bad = {**fields, "tuned": [{**one, name: rubbish}]}
        verdicts.path(KEY.digest).write_text(json.dumps(bad))
        assert verdicts.read(KEY.digest) is None, (name, rubbish)


# Caches


class Metal(proof_caches.Metal):
    """Notes with which launches it would attend, too."""

    def __init__(self, name="metal"):
        super().__init__()
        self.launcher.name, self.asked = name, []

    def prepare(self, call):
        self.asked.append(self.tunings)
        return super().prepare(call)


@pytest.fixture
def machine(verdicts, monkeypatch):
    """A machine with a GPU of that name, whose caches go by `verdicts`."""

    def made(name):
        gpu, ledger = Metal(name), Ledger(verdicts)
        monkeypatch.setattr(select, "gpu_backend", lambda: gpu)
        monkeypatch.setattr(proved, "this_ledger", lambda: ledger)
        return gpu, ledger

    monkeypatch.delenv(select.VARIABLE, raising=False)
    select.requested.cache_clear()
    yield made
    select.requested.cache_clear()


def backend_of():
    """What `explain` says of a new cache."""
    return proof_caches.backend_of(proof_caches.cache_of())


def key_of(gpu, spec="k3v2"):
    sides = quantizers_of(CacheSpec.parse(spec), (64, 64), mx.float16)
    return proved.key_of(gpu, *sides, mx.float16)


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_caches_of_later_processes_are_launched_as_tuned(name, machine, verdicts):
    gpu, _ = machine(name)
    verdicts.write(key_of(gpu).digest, dataclasses.replace(PROVED, tuned=(FOUND,)))
    shown, _, proof = backend_of().partition(": proved ")
    assert shown == (
        f"{name}, tuned: 8 KV heads of 4 rows: simdgroups 2, fill 1.5 "
        "(1.11x at 4096, 1.25x at 32768 tokens)"
    )
    assert bool(proof) is (name == "metal")
    assert gpu.asked[-1] == {Heads(8, 4): FOUND.tuning}
    assert gpu.tunings == {}  # what every machine gets stays what it was


@pytest.mark.parametrize("status", ["wrong", "ok"])
def test_what_is_not_proved_is_not_launched(status, machine, verdicts, monkeypatch):
    gpu, _ = machine("cuda")
    with monkeypatch.context() as patch:
        patch.setattr(proved, "key_of", None)
        assert backend_of() == "cuda"  # no folder: nothing is looked up
    assert not verdicts.folder.exists()
    nothing = dataclasses.replace(FOUND, tuning=UNTUNED)
    tuned = (FOUND,) if status == "wrong" else (nothing,)
    verdict = dataclasses.replace(PROVED, status=status, tuned=tuned)
    verdicts.write(key_of(gpu).digest, verdict)
    assert backend_of() == "cuda"
    assert gpu.asked[-1] == {}


def test_the_variable_goes_without_tuning(machine, verdicts, monkeypatch):
    gpu, _ = machine("cuda")
    verdicts.write(key_of(gpu).digest, dataclasses.replace(PROVED, tuned=(FOUND,)))
    monkeypatch.setenv(select.VARIABLE, "gpu")
    select.requested.cache_clear()
    assert backend_of() == "cuda"


def test_doctor_tunes(machine, verdicts, monkeypatch):
    """Unproved kinds are proved first; a later run says what it found."""
    from typer.testing import CliRunner

    from mlx_turboquant import diagnosis
    from mlx_turboquant.cli.app import main
    from mlx_turboquant.integrations import tuning

    gpu, ledger = machine("metal")
    monkeypatch.setattr(proved, "STAND_IN", "proof_fakes:tunable")
    monkeypatch.setattr(diagnosis, "CASES", ())
    kinds = (tuning.Kind((64, 64), "float16", Heads(1, 2)),)
    monkeypatch.setattr(tuning, "COMMON", kinds)
    run = ["doctor", "--tokens", "600", "--tune", "--kv-bits", "k3v2"]
    done = CliRunner().invoke(main, run)
    assert done.exit_code == 0, done.output
    assert "tuning k3v2, a few seconds for each of 1..." in done.output
    line = r"^kernels for turboquant:3 and turboquant:2.*: ok .*33 checks"
    assert re.search(line, done.output, re.M)
    line = (
        r"^  tuned for 1 KV heads of 2 rows: few_tokens 128.*\dx at 4096, .* tried in"
    )
    assert re.search(line, done.output, re.M), done.output
    assert ledger.look(key_of(gpu)).tuned[0].tuning.few_tokens == 128
    monkeypatch.setattr(select, "gpu_backend", lambda: None)
    for wrong, words in (
        (["--tune"], "--tune needs a GPU"),
        (["--model", "x"], "--model needs --tune"),
    ):
        done = CliRunner().invoke(main, ["doctor", *wrong])
        assert done.exit_code != 0
        assert words in f"{done.output}{done.exception}"


def test_kinds_of_a_model(tmp_path):
    from mlx_turboquant.integrations import tuning

    assert tuning.kinds_of("examples/books-20m") == [
        tuning.Kind((128, 128), "bfloat16", Heads(2, 2))
    ]
    with pytest.raises(UnsupportedModelError, match="cannot load model"):
        tuning.kinds_of(str(tmp_path))
    with pytest.raises(SpecError, match="chosen from the text"):
        list(tuning.tune(Metal(), CacheSpec.parse("auto"), []))
    with pytest.raises(SpecError, match="identity:16 has no kernel"):
        list(tuning.tune(Metal(), CacheSpec.parse("k16v3"), list(tuning.COMMON)))

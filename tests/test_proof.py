"""Kernels are used where they were found right, by a process that may die of it."""

import dataclasses
import json
import os
import plistlib
import re
import subprocess
import sys
import time
import warnings

import pytest
from helpers import ROOT

from mlx_turboquant.proof import runner
from mlx_turboquant.proof.key import Key, Subject, system_build, text_hash
from mlx_turboquant.proof.ledger import Ledger
from mlx_turboquant.proof.runner import CannotRunError, Job
from mlx_turboquant.proof.store import Store, Verdict

SUBJECT = Subject("turboquant:3", "turboquant:2", 64, 64, 128, "float16", "")
KEY = Key(SUBJECT, {"device": "none"}, "")


def job(fake):
    return Job(SUBJECT, "metal", 8, f"proof_fakes:{fake}")


FAULTS = {
    "right": ("ok", "^$"),
    "chatty": ("ok", "^$"),
    "one_percent_off": ("wrong", "matrix products: 8 rows, a tile.*: error 0.0"),
    "wrong_past_4096": ("wrong", "attention over 5000 tokens, 1 rows, far: error 0.0"),
    "does_not_compile": ("compile", "Unable to build metal library$"),
    "segfaults": ("crash", "ended with -11 at matrix products"),
    "aborts": ("crash", "ended with -6 at matrix products"),
    "exits": ("crash", "ended with 0 at matrix products"),
    "flickers": ("wrong", "5000 tokens, 8 rows, decades: run 31 .* differs"),
    "wrong_rotation": ("wrong", "unit vectors: error 0.0"),
    "wrong_outputs": ("wrong", "outputs: error"),
    "wrong_gains": ("wrong", "gains of keys: error 0.0"),
    "wrong_order": ("wrong", "order of keys: codes are not where"),
    "wrong_codes": ("wrong", "codes of keys: error 0.0"),
    "wrong_prefill": ("wrong", "keys for prefill: error"),
    "wrong_arrays": ("wrong", "keys as arrays: error nan"),
}


@pytest.mark.parametrize("fake", FAULTS)
def test_what_becomes_of_kernels(fake, tmp_path):
    status, reason = FAULTS[fake]
    told = []
    verdict = runner.run(
        job(fake), tmp_path / "log", on_check=lambda *numbers: told.append(numbers)
    )
    assert verdict.status == status, verdict
    assert re.search(reason, verdict.reason), verdict.reason
    if status == "ok":
        assert verdict.checks == 33
        assert sorted(set(told)) == [(n, 33) for n in range(34)]
        assert set(verdict.errors) >= {"probe", "attention", "encode", "materialize"}
    if status == "compile":
        assert "error: no such identifier" in (tmp_path / "log").read_text()


def test_a_hang_is_killed():
    start = time.monotonic()
    verdict = runner.run(job("hangs"), None, patience=6)
    assert verdict.status == "hang"
    assert "no answer in 6 s at matrix products" in verdict.reason
    assert time.monotonic() - start < 30


def test_a_child_that_cannot_start_says_nothing_of_kernels(monkeypatch):
    with pytest.raises(CannotRunError, match="before any check"):
        runner.run(job("no_such_backend"), None)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(CannotRunError, match="no process can be started here"):
        runner.run(job("right"), None)


def test_a_verdict_holds_for_what_was_checked():
    def digest(machine=KEY.machine, texts="", **changed):
        subject = dataclasses.replace(SUBJECT, **changed)
        return Key(subject, machine, texts).digest

    digests = [
        digest(),
        digest(keys="turboquant:4"),
        digest(v_dim=128),
        digest(page=0),
        digest(dtype="bfloat16"),
        digest(templates="FMA"),
        digest({"device": "M9"}),
        digest(texts="other"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == KEY.digest


def test_the_texts_and_the_system_are_in_the_key(tmp_path, monkeypatch):
    from mlx_turboquant.kernels import source

    before = text_hash()
    (tmp_path / "metal").mkdir()
    (tmp_path / "metal" / "a.h").write_text("int a;")
    monkeypatch.setattr(source, "metal_folder", lambda: tmp_path / "metal")
    text_hash.cache_clear()
    assert text_hash() != before
    text_hash.cache_clear()
    build = tmp_path / "SystemVersion.plist"
    build.write_bytes(plistlib.dumps({"ProductBuildVersion": "24F74"}))
    assert system_build(build) == "24F74"
    build.write_bytes(b"rubbish")
    assert system_build(build) == os.uname().version


def test_two_ledgers_check_once_and_a_third_reads(verdicts, counted):
    """Locks of two open files hold in one process as in two."""
    ledgers = [Ledger(verdicts) for _ in range(2)]
    for ledger in ledgers:
        assert ledger.standing(KEY) is None
        ledger.start(KEY, job("right"))
        ledger.start(KEY, job("right"))
    first, second = (ledger.wait() for ledger in ledgers)
    assert first == second
    assert first[0].is_ok
    third = Ledger(verdicts)
    assert third.standing(KEY) == first[0]
    third.start(KEY, job("right"))
    assert len(counted) == 1
    names = sorted(path.suffix for path in verdicts.folder.iterdir())
    assert names == ["", ".json", ".log"]


def test_two_real_processes_check_once(verdicts):
    code = (
        "import sys\n"
        "from test_proof import *\n"
        "from pathlib import Path\n"
        f"ledger = Ledger(Store(Path({str(verdicts.folder)!r})))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "ledger.start(KEY, job('right'))\n"
        "(verdict,) = ledger.wait()\n"
        "print(json.dumps(dataclasses.asdict(verdict)))\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]  # the very same, when and how long it took
    assert said[0]["status"] == "ok"
    log = verdicts.path(KEY.digest, "log").read_text()
    assert log.count('"event": "end"') == 1
    assert log.count('"event": "passed"') == 33
    kept = dataclasses.asdict(verdicts.read(KEY.digest))
    assert said[0] == json.loads(json.dumps(kept))


@pytest.mark.parametrize("name", ["lock", "{digest}.json", "{digest}.log"])
def test_a_folder_where_a_file_should_be_is_no_obstacle(name, verdicts):
    path = verdicts.folder / name.format(digest=KEY.digest)
    (path / "rubbish").mkdir(parents=True)
    ledger = Ledger(verdicts)
    assert ledger.standing(KEY) is None
    ledger.start(KEY, job("right"))
    (verdict,) = ledger.wait()
    assert verdict.is_ok
    assert ledger.standing(KEY) == verdict
    left = {p.name for p in verdicts.folder.iterdir()} - {"lock", path.name}
    assert left == set()  # nothing half-written, no mark


def test_what_failed_is_said_once_and_not_tried_again(verdicts, counted):
    ledger = Ledger(verdicts)
    ledger.start(KEY, job("segfaults"))
    ledger.wait()
    with pytest.warns(UserWarning, match=r"tq: its kernels ended the process .*log: "):
        verdict = ledger.standing(KEY)
    assert verdict.status == "crash"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ledger.standing(KEY) == verdict
    with pytest.warns(UserWarning, match="doctor --retry"):
        Ledger(verdicts).standing(KEY)
    assert len(counted) == 1
    assert verdicts.forget() == 1
    assert Ledger(verdicts).standing(KEY) is None


RUBBISH = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"status": "ok"}',
    b"[" * 100_000,
    json.dumps(dataclasses.asdict(Verdict("fine", "x"))).encode(),
    json.dumps({**dataclasses.asdict(Verdict("ok", "x")), "errors": 3}).encode(),
]


def test_rubbish_is_no_verdict(verdicts):
    verdicts.folder.mkdir(parents=True)
    for number, rubbish in enumerate(RUBBISH):
        verdicts.path(str(number)).write_bytes(rubbish)
        assert verdicts.read(str(number)) is None
    (verdicts.folder / "x.json").mkdir()
    assert verdicts.verdicts() == []
    assert verdicts.forget() == 0
    verdicts.path(KEY.digest).write_bytes(RUBBISH[-1])
    ledger = Ledger(verdicts)
    ledger.start(KEY, job("right"))
    assert ledger.wait()[0].is_ok
    assert verdicts.read(KEY.digest).is_ok


def test_a_home_that_cannot_be_written_to(tmp_path, counted):
    """A file where the folder should be: nobody can write there, not even root."""
    (tmp_path / "file").write_text("")
    for turn in (1, 2):
        ledger = Ledger(Store(tmp_path / "file" / "proofs"))
        assert ledger.standing(KEY) is None
        ledger.start(KEY, job("right"))
        assert ledger.wait()[0].is_ok
        assert ledger.standing(KEY).log == ""
        assert len(counted) == turn


def test_no_process_is_allowed(verdicts, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("not here")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    ledger = Ledger(verdicts)
    ledger.start(KEY, job("right"))
    ledger.wait()
    with pytest.warns(UserWarning, match="no process can be started here .not here"):
        assert ledger.standing(KEY).status == "unknown"
    assert verdicts.read(KEY.digest) is None  # the next process tries again


def test_a_process_that_ends_takes_its_check_along(verdicts):
    code = (
        "from test_proof import *\n"
        "from pathlib import Path\n"
        f"ledger = Ledger(Store(Path({str(verdicts.folder)!r})))\n"
        "ledger.start(KEY, job('hangs'))\n"
        "while ledger._child is None: time.sleep(0.01)\n"
        "assert ledger.store.read(KEY.digest).status == 'running'\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        timeout=60,
    )
    assert verdicts.read(KEY.digest) is None

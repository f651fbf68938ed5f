"""Checks that did not come to their end: which are tried again, and what is left."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
from helpers import ROOT
from test_proof import KEY, SUBJECT, job

from mlx_turboquant.proof import mark, runner
from mlx_turboquant.proof.ledger import Ledger
from mlx_turboquant.proof.mark import Mark
from mlx_turboquant.proof.store import BusyError, Verdict

OK = Verdict("ok", str(SUBJECT), checks=33, seconds=1.0)


@pytest.fixture
def asked(monkeypatch):
    """Checks that would have run; each finds the kernels right."""
    jobs = []

    def run(job, log, *rest):
        jobs.append(job)
        return OK

    monkeypatch.setattr(runner, "run", run)
    return jobs


def hanging_check(verdicts):
    """A process that waits for a check that hangs, as a terminal's own job."""
    code = (
        "from test_proof import *\n"
        "from pathlib import Path\n"
        f"ledger = Ledger(Store(Path({str(verdicts.folder)!r})))\n"
        "ledger.start(KEY, job('hangs'))\n"
        "while not ledger.progress[2]: time.sleep(0.01)\n"
        "print(ledger._child.pid, flush=True)\n"
        "ledger.wait()\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process.stdout as said:
        return process, int(said.readline())


def test_ctrl_c_blames_no_kernel(verdicts):
    process, child = hanging_check(verdicts)
    assert os.getpgid(child) != process.pid
    os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    assert verdicts.read(KEY.digest) is None
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_check_ends_with_the_process_that_asked_for_it(verdicts):
    """Killed, that cannot end it: the check sees it itself."""
    process, child = hanging_check(verdicts)
    time.sleep(0.5)  # in a check, where it says nothing more
    process.kill()
    process.wait(30)
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child)


def is_running(pid):
    """Whether there is such a process, other than one that nobody waits for."""
    said = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    )
    return said.stdout.strip()[:1] not in ("", "Z")


def test_a_forked_process_starts_over(verdicts, monkeypatch):
    """Whatever threads of its parent held or waited for; and it holds nothing back."""
    leave = threading.Event()
    monkeypatch.setattr(runner, "run", lambda *rest: leave.wait(20) and OK)
    ledger = Ledger(verdicts)
    ledger.start(KEY, job("right"))
    while is_free(verdicts):
        time.sleep(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 on: of threads, as here
        pid = os.fork()
    if not pid:
        code = 1
        try:
            is_new = ledger._turn.acquire(False) and not ledger.is_busy
            code = 0 if is_new and ledger.wait() == [] else 2
            time.sleep(1)
        finally:
            os._exit(code)
    leave.set()
    assert ledger.wait()[0].is_ok
    assert is_free(verdicts)  # though the other process is there
    assert os.waitpid(pid, 0)[1] == 0


def is_free(store):
    try:
        with store.lock(lambda: True):
            return True
    except BusyError:
        return False


def test_ctrl_c_in_a_shell_lets_it_be_checked_later(verdicts, monkeypatch):
    started = threading.Event()

    def run(job, log, patience, on_start, on_check):
        class Child:
            killed = threading.Event()

            def kill(self):
                self.killed.set()

        on_start(Child())
        started.set()
        assert Child.killed.wait(10)
        return Verdict("crash", "x", "it was killed")

    monkeypatch.setattr(runner, "run", run)
    ledger = Ledger(verdicts)
    ledger.start(KEY, job("right"))
    started.wait(10)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.wait(interrupt)
    assert not ledger.is_busy
    assert verdicts.read(KEY.digest) is None
    assert ledger.standing(KEY) is None
    monkeypatch.setattr(runner, "run", lambda *args: OK)
    ledger.start(KEY, job("right"))
    assert ledger.wait() == [OK]


def test_a_ledger_that_waits_for_another_process_ends_at_once(verdicts, asked):
    ledger = Ledger(verdicts)
    with verdicts.lock():
        ledger.start(KEY, job("right"))
        time.sleep(0.2)
        start = time.monotonic()
        ledger.close()
        assert time.monotonic() - start < 2
    assert not ledger.is_busy
    assert not asked


def checked(verdicts):
    ledger = Ledger(verdicts)
    assert ledger.standing(KEY) is None
    ledger.start(KEY, job("right"))
    (verdict,) = ledger.wait()
    assert verdicts.read(KEY.digest) == verdict
    return verdict


def test_a_process_that_was_killed_blames_no_kernel(verdicts, asked):
    process, child = hanging_check(verdicts)
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    assert verdicts.read(KEY.digest).mark == Mark(mark.this_boot(), 1)
    assert checked(verdicts) == OK
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        (Mark(mark.this_boot(), 2), "2 checks ended with the process that waited"),
        (Mark("another", 1), "the machine went down"),
        (None, "the machine went down"),
    ],
)
@pytest.mark.parametrize("age", [0, 1e6, -1e6])
def test_marks_that_count_as_crashes(left, reason, age, verdicts, asked):
    when = time.time() - age
    verdicts.write(KEY.digest, Verdict("running", "x", when=when, mark=left))
    verdict = checked(verdicts)
    assert verdict.status == "crash"
    assert reason in verdict.reason
    assert not asked


def test_a_second_attempt_is_marked_as_one(verdicts, monkeypatch):
    seen = []

    def run(*args):
        seen.append(verdicts.read(KEY.digest).mark)
        return OK

    monkeypatch.setattr(runner, "run", run)
    left = Mark(mark.this_boot(), 1)
    verdicts.write(KEY.digest, Verdict("running", "x", mark=left))
    assert checked(verdicts) == OK
    assert seen == [Mark(mark.this_boot(), 2)]


def test_a_boot_has_one_name():
    assert mark.this_boot() == mark.this_boot() != ""

"""Runs a check in a child process and says what became of it.

The kernels never run in this process: a GPU that hung refuses the process that hung it,
and a crash would take the user's work along. The child says each check before it runs
it, so that a crash or a hang shows where.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..kernels.tuning import Heads
from .key import Subject
from .store import Verdict
from .tuned import Tuned

#: Seconds in which a check must end, compilation included.
PATIENCE = 60.0
_CHILD = "mlx_turboquant.proof.child"


@dataclass(frozen=True)
class Job:
    """What a child is told.

    Attributes:
        subject: What to check.
        dialect: The launcher's name, ``"metal"`` or ``"cuda"``.
        simdgroups: As `Gpu` takes it.
        backend: ``"module:function"`` that makes the backend to check in place of the
            machine's; "" for the machine's.
        heads: What to tune for, before what was found is checked; None to check what
            every machine gets.
    """

    subject: Subject
    dialect: str
    simdgroups: int
    backend: str = ""
    heads: Heads | None = None


class CannotRunError(Exception):
    """No child could be started, so that nothing is known of the kernels."""


def run(
    job: Job,
    log: Path | None,
    patience: float = PATIENCE,
    on_start: Callable[[subprocess.Popen[bytes]], None] = lambda child: None,
    on_check: Callable[[int, int], None] = lambda passed, checks: None,
) -> Verdict:
    """Check kernels in a child process, to the end or to the first failure.

    Args:
        job: What to check.
        log: Where the child's words go, errors in full; None for nowhere.
        patience: Seconds that a check may take.
        on_start: Called with the child.
        on_check: Called with how many checks have passed, and of how many.

    Raises:
        CannotRunError: if the child could not be started, or did not come to a check.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        # It would be the app itself that starts again.
        raise CannotRunError(
            f"this app, {sys.executable or 'without a path'}, has no Python of its own "
            "to start; MLX_TQ_BACKEND=gpu uses kernels without a check"
        )
    start = time.monotonic()
    state = _Progress()
    # Nothing is held back: it would fail once more when it is closed.
    with open(log or os.devnull, "wb", buffering=0) as words:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                # Ctrl-C is this process's: it would look like a crash of kernels.
                start_new_session=True,
                env=_environment(),
            )
        except (OSError, ValueError) as error:
            raise CannotRunError(f"no process can be started here ({error})") from error
        on_start(child)
        hung = False
        try:
            _tell(child, json.dumps(asdict(job)))
            assert child.stdout is not None
            for line in _lines(child.stdout, patience):
                with contextlib.suppress(OSError):  # a full disk blames no kernel
                    words.write(line + b"\n")
                state.take(line)
                if state.checks:
                    on_check(state.passed, state.checks)
        except TimeoutError:
            hung = True
            child.kill()
        except BaseException:  # Ctrl-C too, which the child knows nothing of
            child.kill()
            raise
        finally:
            code = _code_of(child)
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
    if not state.started and not hung:
        raise CannotRunError(f"the checking process ended with {code} before any check")
    status, reason = state.end
    if hung:
        status = "hang"
        reason = f"no answer in {patience:g} s at {state.current or 'the start'}"
    elif not status:
        status = "crash"
        reason = f"the process ended with {code} at {state.current}"
    return Verdict(
        status,
        str(job.subject),
        reason,
        state.passed,
        round(time.monotonic() - start, 2),
        errors=state.errors,
        facts=state.facts,
        log="" if log is None else str(log),
        tuned=() if state.tuned is None else (state.tuned,),
    )


class _Progress:
    """What the lines of a child have said so far."""

    def __init__(self) -> None:
        self.started, self.current, self.passed = False, "", 0
        self.checks = 0
        self.errors: dict[str, float] = {}
        self.facts: dict[str, str] = {}
        self.end = ("", "")
        self.tuned: Tuned | None = None

    def take(self, line: bytes) -> None:
        """Take a line; one that is no message of the child's says nothing."""
        try:
            message: dict[str, Any] = json.loads(line)
            event = message["event"]
        except (ValueError, TypeError, KeyError):
            return
        if event == "check":
            self.started, self.current = True, message["name"]
        elif event == "checks":
            self.checks = message["number"]
        elif event == "fact":
            self.facts[message["name"]] = message["found"]
        elif event == "passed":
            kind, error = message["kind"], message["error"]
            self.passed += 1
            self.errors[kind] = max(error, self.errors.get(kind, 0.0))
        elif event == "tuned":
            self.tuned = Tuned.of(message)
        elif event == "end":
            self.end = (message["status"], message["reason"])


def _environment() -> dict[str, str]:
    """Of a child: what this process imports it finds, and no more."""
    package = str(Path(__file__).parents[2])
    return {
        **os.environ,
        # "" is the current folder, where a json.py may lie about; this package is last,
        # in case that it was found there.
        "PYTHONPATH": os.pathsep.join([*filter(None, map(str, sys.path)), package]),
        "PYTHONSAFEPATH": "1",
        # It makes the kernels itself; should anything there ask, no proof begins.
        "MLX_TQ_BACKEND": "reference",
    }


def _code_of(child: subprocess.Popen[bytes]) -> int:
    """How a child ended that has closed its end of the pipe, or is killed."""
    try:
        return child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _tell(child: subprocess.Popen[bytes], text: str) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(text.encode())
        child.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already, which its exit code says


def _lines(pipe: IO[bytes], patience: float) -> Iterator[bytes]:
    """Lines of a pipe until its end.

    Raises:
        TimeoutError: if nothing comes for so many seconds.
    """
    rest = b""
    # Not `select`, which takes no file number above 1,023.
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, selectors.EVENT_READ)
        while True:
            if not ready.select(patience):
                raise TimeoutError
            got = os.read(pipe.fileno(), 1 << 16)
            if not got:
                return
            *lines, rest = (rest + got).split(b"\n")
            yield from lines

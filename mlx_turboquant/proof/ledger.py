"""What this process knows of its machine's kernels, and checks that are under way.

Verdicts are read once. Where there is none, `start` runs a check in the background,
once in a process for each key; the lock of the `store` sees to it that two processes do
not run it both. Every failure is one warning, and leaves the reference to do the work.
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

from . import runner
from .key import Key
from .runner import CannotRunError, Job
from .store import RUNNING, TUNER_LOG, Store, Verdict
from .tuned import Tuned

#: Said of kernels whose check is under way.
UNDER_WAY = (
    "its kernels are being checked on this machine, for the first time; from the page "
    "after that on they are used"
)
#: The ``status`` of what is known of kernels that could not be checked; never stored.
UNKNOWN = "unknown"


class Ledger:
    """The verdicts that one process goes by.

    Args:
        store: Where verdicts are kept.
        patience: As `runner.run` takes it. A mark of a run that is older and has no
            process is that of a crash.
    """

    def __init__(self, store: Store, patience: float = runner.PATIENCE) -> None:
        self.store, self._patience = store, patience
        self._known: dict[str, Verdict] = {}
        self._told: set[str] = set()
        self._threads: dict[str, threading.Thread] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._guard = threading.Lock()
        # One child at a time, also where no file can be locked.
        self._turn = threading.Lock()

    def standing(self, key: Key) -> Verdict | None:
        """What is known of a key's kernels; None if that is nothing yet.

        Warns, once, if they are not to be used.
        """
        digest, known = key.digest, self.look(key)
        if known is not None:
            self._tell(digest, known)
        return known

    def look(self, key: Key) -> Verdict | None:
        """As `standing`, without a word."""
        digest = key.digest
        known = self._known.get(digest)
        if known is None and digest not in self._threads:
            found = self.store.read(digest)
            if found is not None and found.status != RUNNING:
                known = self._known[digest] = found
        return known

    def tune(self, key: Key, job: Job) -> Verdict | None:
        """Tune kernels that a check found right, and wait for it; others stay.

        What is found is checked as they were. If it is not right, or ends its process,
        that is kept as the tuner's reason: the verdict on what every machine gets
        stays.

        Args:
            key: Whose kernels.
            job: With ``heads``.
        """
        digest, heads, found = key.digest, job.heads, self.look(key)
        if heads is None or found is None or not found.is_ok:
            return found
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._turn)
            log: Path | None = self.store.path(digest).with_suffix(TUNER_LOG)
            try:
                stack.enter_context(self.store.lock())
            except OSError:
                log = None
            try:
                made = self._in_child(job, log)
            except CannotRunError as error:
                made = Verdict(UNKNOWN, found.subject, str(error))
            if made is None:
                return found
            tuned = made.tuned
            if not made.is_ok:
                tuned = (Tuned(heads, reason=f"{made.status}: {made.reason}"),)
            others = tuple(one for one in found.tuned if one.heads != heads)
            found = self._known[digest] = replace(found, tuned=(*others, *tuned))
            if log is not None:
                self.store.write(digest, found)
        return found

    def found(self, digest: str) -> Verdict | None:
        """The verdict that this process goes by, if it has asked for one."""
        return self._known.get(digest)

    def overturn(self, digest: str, reason: str) -> None:
        """Kernels that were proved have been seen to be wrong; warns of it."""
        proved = self._known.get(digest)
        if proved is None:
            return
        wrong = replace(proved, status="wrong", reason=reason, when=time.time())
        self._known[digest] = wrong
        with contextlib.suppress(OSError), self.store.lock():
            self.store.write(digest, wrong)
        self._tell(digest, wrong)

    def forget(self) -> int:
        """Forget every verdict, so that kernels are checked anew; returns how many.

        Raises:
            OSError: if the folder cannot be written to.
        """
        count = self.store.forget()
        self.wait()
        with self._guard:
            self._known.clear()
            self._told.clear()
            self._threads.clear()
        return count

    def _tell(self, digest: str, verdict: Verdict) -> None:
        """Warn once of kernels that are not to be used."""
        if verdict.is_ok or digest in self._told:
            return
        self._told.add(digest)
        warnings.warn(f"tq: {words(verdict)}", stacklevel=3)

    def start(self, key: Key, job: Job) -> None:
        """Have a key's kernels checked in the background, unless that is under way."""
        with self._guard:
            if key.digest in self._threads or key.digest in self._known:
                return
            thread = threading.Thread(
                target=self._check, args=(key, job), name="tq-proof", daemon=True
            )
            self._threads[key.digest] = thread
        if len(self._threads) == 1:
            atexit.register(self.close)
        thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a check is under way."""
        return any(thread.is_alive() for thread in self._threads.values())

    @property
    def known(self) -> list[Verdict]:
        """The verdicts that this process has asked for and that there are."""
        return list(self._known.values())

    def wait(self) -> list[Verdict]:
        """What checks of this process came to, once none is under way."""
        for thread in list(self._threads.values()):
            thread.join()
        return [self._known[d] for d in self._threads if d in self._known]

    def close(self) -> None:
        """End a check that is under way, as if it had not begun."""
        with self._guard:
            self._ended = True
            child = self._child
            if child is None:
                return
            child.kill()
        for thread in list(self._threads.values()):
            thread.join(5)

    def _check(self, key: Key, job: Job) -> None:
        try:
            with self._turn:
                verdict = self._run(key, job)
        except CannotRunError as error:
            verdict = Verdict(UNKNOWN, str(job.subject), str(error))
        if verdict is not None:  # else this process ends
            self._known[key.digest] = verdict

    def _run(self, key: Key, job: Job) -> Verdict | None:
        """Check under the lock; without a folder to write to, for this process only."""
        digest, store = key.digest, self.store
        try:
            with store.lock():
                found = store.read(digest)
                if found is not None and found.status != RUNNING:
                    return found  # another process was faster
                if found is not None and time.time() - found.when > self._patience:
                    crashed = replace(
                        found,
                        status="crash",
                        reason="an earlier check did not come to its end",
                    )
                    store.write(digest, crashed)
                    return crashed
                store.write(digest, Verdict(RUNNING, str(job.subject)))
                verdict = None
                try:
                    verdict = self._in_child(job, store.path(digest, "log"))
                    if verdict is not None:
                        store.write(digest, verdict)
                finally:
                    if verdict is None:
                        store.drop(digest)
                return verdict
        except OSError:
            return self._in_child(job, None)

    def _in_child(self, job: Job, log: Path | None) -> Verdict | None:
        """What a child says; None if this process ended it."""

        def remember(child: subprocess.Popen[bytes]) -> None:
            with self._guard:
                self._child = child
                if self._ended:
                    child.kill()

        if self._ended:
            return None
        try:
            verdict = runner.run(job, log, self._patience, remember)
        except CannotRunError:
            if self._ended:
                return None
            raise
        finally:
            self._child = None
        return None if self._ended else verdict


def words(verdict: Verdict) -> str:
    """Why kernels with this verdict are not used, on one line."""
    said = {
        "wrong": "gave wrong results here",
        "compile": "could not be compiled or launched here",
        "crash": "ended the process that checked them here",
        "hang": "did not come to an end here",
        UNKNOWN: "could not be checked here",
    }[verdict.status]
    text = f"its kernels {said} ({verdict.reason})"
    if verdict.log:
        text += f"; log: {verdict.log}"
    if verdict.status != UNKNOWN:
        text += "; 'mlx_tq.doctor --retry' checks them again"
    return text

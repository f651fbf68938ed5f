"""What this process knows of its machine's kernels, and checks that are under way.

Verdicts are read once. Where there is none, `start` runs a check in the background,
once in a process for each key; the lock of the `store` sees to it that two processes do
not run it both. Every failure is one warning, and leaves the reference to do the work.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import runner
from .key import Key
from .mark import UNKNOWN_BOOT, Mark, this_boot
from .runner import CannotRunError, Job
from .store import RUNNING, TUNER_LOG, BusyError, Store, Verdict
from .tuned import Tuned

#: Said of kernels whose check is under way.
UNDER_WAY = (
    "its kernels are being checked on this machine, for the first time; from the page "
    "after that on they are used"
)
#: The ``status`` of what is known of kernels that could not be checked; never stored.
UNKNOWN = "unknown"
#: Seconds between two looks at a check that is waited for.
_GLANCE = 0.2


def _forked(ledger: Ledger | None) -> None:
    if ledger is not None:
        ledger.start_over()


class Ledger:
    """The verdicts that one process goes by.

    Args:
        store: Where verdicts are kept.
        patience: As `runner.run` takes it.
    """

    def __init__(self, store: Store, patience: float = runner.PATIENCE) -> None:
        self.store, self._patience = store, patience
        self._known: dict[str, Verdict] = {}
        self._told: set[str] = set()
        # By digest, set when a check is over. Threads themselves cannot be asked: one
        # whose `join` Ctrl-C interrupts counts as ended from then on (Python 3.11).
        self._checks: dict[str, threading.Event] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._ended = False
        #: Of the check that is under way: its subject, checks that passed, of how many.
        self.progress = ("", 0, 0)
        self._guard = threading.Lock()
        # One child at a time, also where no file can be locked.
        self._turn = threading.Lock()
        alive = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forked(alive()))

    def start_over(self) -> None:
        """In a forked process: no thread has come along, whatever it held or ran."""
        self._guard, self._turn = threading.Lock(), threading.Lock()
        under_way = [key for key, over in self._checks.items() if not over.is_set()]
        for digest in under_way:
            del self._checks[digest]
        self._child, self.progress = None, ("", 0, 0)

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
        if known is None and digest not in self._checks:
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
            # A step that was off meanwhile has the last word.
            found = self._known[digest]
            if not found.is_ok:
                return found
            others = tuple(one for one in found.tuned if one.heads != heads)
            found = self._known[digest] = replace(found, tuned=(*others, *tuned))
            stored = self.store.read(digest)
            if log is not None and (stored is None or stored.is_ok):
                with contextlib.suppress(OSError):  # a full disk: for this process
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
        self._tell(digest, wrong)
        # Without the lock, which another process may hold for a minute and more: files
        # are renamed, and there is no mark of a key that has a verdict.
        with contextlib.suppress(OSError):
            self.store.write(digest, wrong)

    def forget(self) -> int:
        """Forget every verdict, so that kernels are checked anew; returns how many.

        Raises:
            BusyError: if another process checks kernels.
            OSError: if the folder cannot be written to.
        """
        self.wait()
        count = self.store.forget()
        with self._guard:
            self._known.clear()
            self._told.clear()
            self._checks.clear()
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
            if key.digest in self._checks or key.digest in self._known:
                return
            over = self._checks[key.digest] = threading.Event()
            thread = threading.Thread(
                target=self._check, args=(key, job, over), name="tq-proof", daemon=True
            )
        if len(self._checks) == 1:
            atexit.register(self.close)
        thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a check is under way."""
        return not all(over.is_set() for over in self._checks.values())

    @property
    def known(self) -> list[Verdict]:
        """The verdicts that this process has asked for and that there are."""
        return list(self._known.values())

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> list[Verdict]:
        """What checks of this process came to, once none is under way.

        Ctrl-C ends them as if they had not begun.

        Args:
            meanwhile: Called some times a second.
        """
        try:
            for over in list(self._checks.values()):
                while not over.wait(_GLANCE):
                    meanwhile()
        except KeyboardInterrupt:
            self.close()
            with self._guard:
                # The user of a shell may well ask again.
                self._ended = False
                for digest in set(self._checks) - set(self._known):
                    del self._checks[digest]
            raise
        return [self._known[d] for d in self._checks if d in self._known]

    def close(self) -> None:
        """End a check that is under way, as if it had not begun."""
        with self._guard:
            self._ended = True
            if self._child is not None:
                self._child.kill()
        # Also those that wait for a turn or the lock: marks are dropped by threads.
        for over in list(self._checks.values()):
            over.wait(5)

    def _check(self, key: Key, job: Job, over: threading.Event) -> None:
        try:
            with self._turn:
                verdict = self._run(key, job)
            if verdict is not None:  # else this process ends
                self._known[key.digest] = verdict
        except CannotRunError as error:
            self._known[key.digest] = Verdict(UNKNOWN, str(job.subject), str(error))
        except Exception as error:  # a mistake of ours must not be waited for for ever
            reason = f"{type(error).__name__}: {error}"
            self._known[key.digest] = Verdict(UNKNOWN, str(job.subject), reason)
        finally:
            over.set()

    def _run(self, key: Key, job: Job) -> Verdict | None:
        """Check under the lock; without a folder to write to, for this process only."""
        digest, store = key.digest, self.store
        try:
            with store.lock(lambda: self._ended):
                found = store.read(digest)
                if found is not None and found.status != RUNNING:
                    return found  # another process was faster
                attempt = 1
                if found is not None:  # its writer is gone, or it would hold the lock
                    left = found.mark or UNKNOWN_BOOT
                    if left.blame:
                        crashed = replace(
                            found, status="crash", reason=left.blame, mark=None
                        )
                        store.write(digest, crashed)
                        return crashed
                    attempt = left.attempt + 1
                mark = Mark(this_boot(), attempt)
                store.write(digest, Verdict(RUNNING, str(job.subject), mark=mark))
                is_kept = False
                try:
                    verdict = self._in_child(job, store.path(digest, "log"))
                    if verdict is not None:
                        # A disk that is full by now costs others a check, not this one.
                        with contextlib.suppress(OSError):
                            store.write(digest, verdict)
                            is_kept = True
                finally:
                    if not is_kept:
                        store.drop(digest)
                return verdict
        except BusyError:
            return None  # this process ends
        except OSError:
            return self._in_child(job, None)

    def _in_child(self, job: Job, log: Path | None) -> Verdict | None:
        """What a child says; None if this process ended it."""

        def remember(child: subprocess.Popen[bytes]) -> None:
            with self._guard:
                self._child = child
                if self._ended:
                    child.kill()

        def progress(passed: int, checks: int) -> None:
            self.progress = (str(job.subject), passed, checks)

        if self._ended:
            return None
        progress(0, 0)
        try:
            verdict = runner.run(job, log, self._patience, remember, progress)
        except CannotRunError:
            if self._ended:
                return None
            raise
        finally:
            self._child = None
            progress(0, 0)  # the next may have to wait for another process first
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

"""`Verdict`s on disk: one small JSON file for each key, in the user's cache folder.

Files are written beside and renamed. A ``running`` mark is a verdict too: whoever
writes it holds the folder's lock and replaces it; what a mark whose writer is gone says
is `mark`'s. What is no verdict is ignored.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..atomic import replacing
from .mark import Mark
from .place import cache_folder
from .tuned import Tuned

RUNNING, OK = "running", "ok"
#: How the name of a tuner's log ends.
TUNER_LOG = ".tuner.log"
#: What a check can end in. compile: a kernel could not be built or launched.
STATUSES = (RUNNING, OK, "wrong", "compile", "crash", "hang")
#: Seconds between two looks at a lock that another process holds.
_PAUSE = 0.05


class BusyError(Exception):
    """Another process holds the lock, and this one does not wait for it."""


@dataclass(frozen=True)
class Verdict:
    """What a check of kernels ended in.

    Attributes:
        status: One of `STATUSES`.
        subject: What was checked, in words.
        reason: Why it is not ok, in words; "" if it is.
        checks: How many checks passed.
        seconds: How long all took.
        when: Seconds since 1970 when it was written.
        errors: Largest relative error by kind of check.
        facts: What was found of the hardware, by name.
        log: Path of the log; "" if there is none.
        tuned: What tuners found, each for other heads.
        mark: Of a check that is under way.
    """

    status: str
    subject: str
    reason: str = ""
    checks: int = 0
    seconds: float = 0.0
    when: float = field(default_factory=time.time)
    errors: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    log: str = ""
    tuned: tuple[Tuned, ...] = ()
    mark: Mark | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the kernels may be used."""
        return self.status == OK

    @property
    def history(self) -> str:
        """When it was written, how many checks passed and how long they took."""
        text = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        if self.seconds:
            text += f", {self.checks} checks in {self.seconds:.1f} s"
        if self.errors:
            text += f", largest error {max(self.errors.values()):.1e}"
        return text


class Store:
    """The verdicts in a folder.

    Args:
        folder: Where; None for `cache_folder`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() if folder is None else folder

    def path(self, digest: str, suffix: str = "json") -> Path:
        """Of a key's verdict, or of its log."""
        return self.folder / f"{digest}.{suffix}"

    def _make_folder(self) -> None:
        # For this user alone: kernels are used by what is in it.
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def read(self, digest: str) -> Verdict | None:
        """A key's verdict, which may be a running mark; None if there is none."""
        return _read(self.path(digest))

    def write(self, digest: str, verdict: Verdict) -> None:
        """Put a verdict in the place of any older one.

        Raises:
            OSError: if the folder cannot be written to.
        """
        self._make_folder()
        with replacing(self.path(digest)) as path:
            path.write_text(json.dumps(asdict(verdict), indent=1) + "\n")

    def verdicts(self) -> list[Verdict]:
        """All there are, the latest first."""
        found = (_read(path) for path in sorted(self.folder.glob("*.json")))
        return sorted((v for v in found if v is not None), key=lambda v: -v.when)

    def drop(self, digest: str) -> None:
        """Forget a key's verdict."""
        with contextlib.suppress(OSError):
            self.path(digest).unlink()

    def forget(self) -> int:
        """Forget every verdict and its log; returns how many verdicts there were.

        Raises:
            BusyError: if another process holds the lock.
            OSError: if the folder cannot be written to.
        """
        paths = [p for p in self.folder.glob("*.json") if _read(p) is not None]
        if not paths:
            return 0
        with self.lock(lambda: True):
            for path in paths:
                path.unlink(missing_ok=True)
                for suffix in (".log", TUNER_LOG):
                    path.with_suffix(suffix).unlink(missing_ok=True)
        return len(paths)

    @contextlib.contextmanager
    def lock(self, gives_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Held by one process at a time; others wait, and a dead one's is free.

        Args:
            gives_up: Asked while another process holds it, again and again: a system
                call that waits could not be left when this process ends.

        Raises:
            BusyError: if it is held and not to be waited for.
            OSError: if the folder cannot be written to.
        """
        self._make_folder()
        with (self.folder / "lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if gives_up():
                        raise BusyError("another process checks kernels") from None
                time.sleep(_PAUSE)
            try:
                yield
            finally:
                # Closed, it would stay with a process forked meanwhile.
                fcntl.flock(file, fcntl.LOCK_UN)


def _read(path: Path) -> Verdict | None:
    try:
        found = json.loads(path.read_text())
        verdict = Verdict(
            status=str(found["status"]),
            subject=str(found["subject"]),
            reason=str(found["reason"]),
            checks=int(found["checks"]),
            seconds=float(found["seconds"]),
            when=float(found["when"]),
            errors={str(kind): float(e) for kind, e in found["errors"].items()},
            facts={str(name): str(what) for name, what in found["facts"].items()},
            log=str(found["log"]),
            # Younger than the rest: older files are without.
            tuned=tuple(Tuned.of(one) for one in found.get("tuned", ())),
            mark=Mark.of(found.get("mark")),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return verdict if verdict.status in STATUSES else None

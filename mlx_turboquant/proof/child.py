"""``python -m mlx_turboquant.proof.child``: the process that runs unproved kernels.

A `runner.Job` as JSON comes on stdin; each line on stdout is a message in JSON:

    {"event": "tuned", ..}                            what a tuner found: `Tuned.fields`
    {"event": "checks", "number": ..}                 how many there will be
    {"event": "check", "name": ..}                    about to run
    {"event": "fact", "name": .., "found": ..}        of the hardware
    {"event": "passed", "kind": .., "error": ..}      it ran, and agrees
    {"event": "end", "status": .., "reason": ..}      all passed, or the first failure
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from ..kernels.tuning import UNTUNED, Heads, Tuning
from .key import Subject
from .runner import PATIENCE, Job
from .tuned import Tuned

#: Seconds after which it ends itself, if nobody is left who would.
_LONGEST = 20 * PATIENCE
#: Seconds between two looks at whether its parent is there.
_GLANCE = 0.5


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a kernel that hangs would keep it."""
    while os.getppid() == parent:
        time.sleep(_GLANCE)
    os._exit(1)


def main() -> None:
    """Run the checks of the job on stdin."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    faulthandler.enable()
    faulthandler.dump_traceback_later(_LONGEST, exit=True)
    # Kernels and libraries that print must not do so between the messages.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=messages, flush=True)

    job = _job(json.load(sys.stdin))
    from . import checks
    from .judge import WrongError

    backend = _backend(job)
    if job.heads is not None:
        tuned = _tuned(job, backend, say)
        say(event="tuned", **tuned.fields)
        # What every machine gets was checked before.
        if tuned.tuning == UNTUNED:
            say(event="end", status="ok", reason="")
            return
        backend = backend.tuned(tuned.tuning)
    launcher = getattr(backend, "launcher", None)
    say(event="checks", number=checks.how_many(launcher))
    every = checks.all_checks(
        job.subject,
        launcher,
        lambda fact: say(event="fact", name=fact.name, found=fact.found),
    )
    for check in every:
        say(event="check", name=check.name)
        try:
            error = check.run(backend)
        except WrongError as wrong:
            say(event="end", status="wrong", reason=f"{check.name}: {wrong}")
            return
        except Exception as problem:  # a compiler's message, whatever its type
            traceback.print_exc()
            first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            say(event="end", status="compile", reason=f"{check.name}: {first}")
            return
        say(event="passed", kind=check.kind, error=error)
    say(event="end", status="ok", reason="")


def _tuned(job: Job, backend: Any, say: Callable[..., None]) -> Tuned:
    """What is fastest, said before it is launched: it may take this process along."""
    from .tuner import search
    from .variants import axes
    from .workload import Workload

    assert job.heads is not None
    say(event="check", name="the tuner's start")
    heads = Heads(*job.heads)
    workload = Workload(job.subject, heads, backend)
    workload.hold(UNTUNED)

    def hold(tuning: Tuning) -> None:
        say(event="check", name=f"tuning: {tuning}")
        try:
            workload.hold(tuning)
        except Exception:
            traceback.print_exc()
            raise

    return search(
        axes(workload.quantizers.values, heads.rows, job.dialect),
        workload.seconds,
        hold,
        time.perf_counter,
        heads,
        lambda line: print(line, file=sys.stderr, flush=True),
    )


def _job(fields: dict[str, Any]) -> Job:
    return Job(**{**fields, "subject": Subject(**fields["subject"])})


def _backend(job: Job) -> Any:
    if job.backend:
        module, name = job.backend.split(":")
        return getattr(importlib.import_module(module), name)()
    from ..backends.gpu import Gpu
    from ..kernels.kernel import MlxLauncher

    dialect: Any = job.dialect
    return Gpu(MlxLauncher(dialect), job.simdgroups)


if __name__ == "__main__":
    main()

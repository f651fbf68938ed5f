"""`evaluate`: run a plan over a list of caches.

Every finished job is in the folder's ``results.json``, and is not done again.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import SpecError
from ..integrations.stock import check_model
from ..spec import CacheSpec
from . import text
from .grid import BASELINES, SPECS, EvalPlan
from .jobs import JobRunner
from .results import Evaluation

#: Called with (what is being done, jobs done, jobs in all).
Progress = Callable[[str, int, int], None]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    specs: Sequence[str | float | CacheSpec] = SPECS,
    *,
    baselines: Sequence[str] = BASELINES,
    plan: EvalPlan | None = None,
    text_file: str | Path | None = None,
    pathology: Sequence[str] = (),
    folder: str | Path | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure what caches cost a model, against its own uncompressed cache.

    Every token goes through the real caches, in chunks and one by one. ``fp`` among
    the baselines is the uncompressed cache read in chunks of another size: the noise
    of the arithmetic, below which no difference means anything.

    Args:
        model: Loaded by mlx-lm (or `load`, on a CPU).
        tokenizer: Its tokenizer.
        specs: Caches of this package, as specs or their text.
        baselines: See `evals.caches`.
        plan: What to measure; by default the standard grid.
        text_file: UTF-8 text to read; by default the bundled held-out books.
        pathology: Names from `evals.pathologies`; all caches are scored under each.
        folder: Where ``results.json`` is kept. Finished jobs in it are not repeated.
        name: What to call the model in reports.
        progress: Called at the start of every job, and at the end.

    Raises:
        SpecError: for a spec, text or folder that does not fit.
        UnsupportedModelError: if the model cannot take a cache or a pathology.
    """
    check_model(model)
    plan = plan or EvalPlan()
    caches = [*baselines, *(str(CacheSpec.parse(spec)) for spec in specs)]
    about = {
        "model": name or str(getattr(model, "model_type", type(model).__name__)),
        "text": str(text_file or "bundled books"),
        "plan": plan.state(),
        "machine": platform.machine(),
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
    }
    path = None if folder is None else Path(folder) / "results.json"
    results = Evaluation(about, {})
    if path is not None:
        if not str(folder):
            raise SpecError("the folder of the results has no name; give one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SpecError(
                f"cannot make the folder {folder} ({reason}); name another"
            ) from error
        if path.exists():
            results = Evaluation.load(path)
            results.check_same(about, path)
    runner = JobRunner(
        model, tokenizer, plan, text.read_texts(text_file), results.own_texts()
    )
    jobs = list(runner.jobs(caches, pathology))
    for done, (key, job) in enumerate(jobs):
        if progress is not None:
            progress(key, done, len(jobs))
        if key not in results.jobs:
            start = time.perf_counter()
            results.jobs[key] = job()
            results.jobs[key]["seconds"] = round(time.perf_counter() - start, 1)
            if path is not None:
                results.save(path)
    if progress is not None:
        progress("done", len(jobs), len(jobs))
    return results

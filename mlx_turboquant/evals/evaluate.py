"""`evaluate`: run a plan over a list of caches, job by job.

Owns the order of jobs, what is kept between them, and resuming: every finished job is
in the folder's ``results.json``, and is not done again.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..integrations import factory as host
from ..spec import CacheSpec
from . import needles, pathologies, scoring, text
from .caches import maker, uses_seed
from .grid import BASELINES, SPECS, EvalPlan
from .results import Evaluation, Job

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
        progress: Told of every job.

    Raises:
        SpecError: for a spec, text or folder that does not fit.
        UnsupportedModelError: if the model cannot take a cache or a pathology.
    """
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
    found = Evaluation(about, {})
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = Evaluation.load(path)
            found.check_same(about, path)
    run = _Run(model, tokenizer, plan, text.read_texts(text_file))
    jobs = list(run.jobs(caches, pathology))
    for done, (key, job) in enumerate(jobs):
        if progress is not None:
            progress(key, done, len(jobs))
        if key not in found.jobs:
            start = time.perf_counter()
            found.jobs[key] = job()
            found.jobs[key]["seconds"] = round(time.perf_counter() - start, 1)
            if path is not None:
                found.save(path)
    if progress is not None:
        progress("done", len(jobs), len(jobs))
    return found


@dataclass
class _Run:
    """The model and texts of a run, and the reference scores last used."""

    model: nn.Module
    tokenizer: Any
    plan: EvalPlan
    texts: list[str]
    _written: dict[int, list[int]] = field(default_factory=dict)
    _base: tuple[tuple[int, str], list[int], list[mx.array]] | None = None

    def jobs(
        self, caches: Sequence[str], pathology: Sequence[str]
    ) -> Iterator[tuple[str, Callable[[], Job]]]:
        """Every job's key and what does it; neighbours share references."""
        plan = self.plan
        for sick in ("", *pathology):
            for window in range(plan.windows):
                for cache in caches:
                    yield self._score(cache, window, sick)
        if plan.layers:
            layers = len(host.stock_caches(self.model))
            for cache in caches:
                if uses_seed(cache):
                    for layer in range(layers):
                        yield self._layer(cache, layer)
        for length in plan.needles:
            for cache in caches:
                yield self._needle(cache, length)
        if plan.greedy:
            for window in range(plan.windows):
                for cache in caches:
                    yield self._greedy(cache, window)

    def _window(self, index: int, length: int) -> list[int]:
        count = max(self.plan.windows, index + 1)
        return text.windows(self.texts, self.tokenizer, length, count)[index]

    def _make(self, cache: str, window: int) -> Any:
        return maker(cache, self.model, window % self.plan.seeds)

    def _reference(self, window: int, sick: str) -> tuple[list[int], list[mx.array]]:
        key = (window, sick)
        if self._base is None or self._base[0] != key:
            self._base = None  # let the older one go first
            tokens = self._window(window, self.plan.lengths[-1] + 1)
            base = scoring.reference(self.model, tokens, self._make("fp", 0), self.plan)
            self._base = (key, tokens, base)
        return self._base[1:]

    def _score(
        self, cache: str, window: int, sick: str
    ) -> tuple[str, Callable[[], Job]]:
        key = f"score {cache} window {window}" + (f" {sick}" if sick else "")

        def job() -> Job:
            with _maybe(self.model, sick):
                tokens, base = self._reference(window, sick)
                make = self._make(cache, window)
                # The uncompressed cache is read in other chunks: its self-noise.
                prefill = self.plan.prefill // 2 or 1 if cache == "fp" else None
                spans = scoring.score(
                    self.model, tokens, make, self.plan, base, prefill
                )
            return {
                "kind": "score",
                "name": cache,
                "window": window,
                "pathology": sick,
                "spans": spans,
            }

        return key, job

    def _layer(self, cache: str, layer: int) -> tuple[str, Callable[[], Job]]:
        def job() -> Job:
            tokens, base = self._reference(0, "")
            made, plain = self._make(cache, 0), self._make("fp", 0)

            def make() -> list[Any]:
                return [
                    ours if index == layer else stock
                    for index, (ours, stock) in enumerate(
                        zip(made(), plain(), strict=True)
                    )
                ]

            spans = scoring.score(self.model, tokens, make, self.plan, base)
            return {"kind": "layer", "name": cache, "layer": layer, "spans": spans}

        return f"layer {layer} {cache}", job

    def _needle(self, cache: str, length: int) -> tuple[str, Callable[[], Job]]:
        def job() -> Job:
            answers = needles.retrieve(
                self.model,
                self.tokenizer,
                self._window(0, length),
                self._make(cache, 0),
                self.plan.depths,
                self.plan.prefill,
            )
            return {"kind": "needle", "name": cache, "answers": answers}

        return f"needle {cache} length {length}", job

    def _greedy(self, cache: str, window: int) -> tuple[str, Callable[[], Job]]:
        def job() -> Job:
            if window not in self._written:
                self._written[window] = self._write("fp", window)
            got = self._write(cache, window)
            same = needles.common_prefix(self._written[window], got)
            return {"kind": "greedy", "name": cache, "window": window, "same": same}

        return f"greedy {cache} window {window}", job

    def _write(self, cache: str, window: int) -> list[int]:
        plan = self.plan
        tokens = self._window(window, plan.lengths[0])
        make = self._make(cache, window)
        return needles.greedy(self.model, tokens, make, plan.greedy, plan.prefill)


@contextlib.contextmanager
def _maybe(model: nn.Module, sick: str) -> Iterator[None]:
    if not sick:
        yield
        return
    with pathologies.injected(model, sick):
        yield

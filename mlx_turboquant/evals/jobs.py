"""The jobs of an evaluation: what each measures, and in which order.

Jobs that compare with the same scores of the uncompressed cache stand together, so that
these are computed once and only one set of them is in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..integrations.model_folder import check_tokens
from ..integrations.stock import stock_caches
from ..spec import CacheSpec
from . import bounds, calls, long, needles, pathologies, scoring, text
from .caches import CacheFactory, cache_factory, uses_seed
from .grid import EvalPlan
from .results import Job

#: A job's key, and what does it.
KeyedJob = tuple[str, Callable[[], Job]]


@dataclass
class JobRunner:
    """The model and texts of a run, and the reference scores last used.

    Attributes:
        model: Loaded by mlx-lm.
        tokenizer: Its tokenizer.
        plan: What to measure.
        texts: What to read.
        own_texts: What the model has written itself, by window.
    """

    model: nn.Module
    tokenizer: Any
    plan: EvalPlan
    texts: list[str]
    own_texts: dict[int, list[int]] = field(default_factory=dict)
    _greedy_texts: dict[int, list[int]] = field(default_factory=dict, init=False)
    _reference: tuple[tuple[int, str], list[int], list[mx.array]] | None = field(
        default=None, init=False
    )

    def jobs(
        self, caches: Sequence[str], transforms: Sequence[str]
    ) -> Iterator[KeyedJob]:
        """Every job of the plan.

        Args:
            caches: Names, as `evals.caches` reads them.
            transforms: Names from `evals.pathologies`.
        """
        plan = self.plan
        for transform in ("", *transforms) if plan.lengths else ():
            for window in range(plan.windows):
                for cache in caches:
                    yield self._score(cache, window, transform)
        if plan.layers:
            layers = len(stock_caches(self.model))
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
        if plan.long:
            for window in range(plan.windows):
                for cache in caches:
                    yield self._long(cache, window)
        if plan.bounds:
            for cache in caches:
                if uses_seed(cache):
                    yield self._bound(cache)

    def _window(self, index: int, length: int) -> list[int]:
        count = max(self.plan.windows, index + 1)
        return text.windows(self.texts, self.tokenizer, length, count)[index]

    def _factory(self, cache: str, window: int) -> CacheFactory:
        plan = self.plan
        return cache_factory(cache, self.model, window % plan.seeds, plan.max_kv_size)

    @property
    def _exact(self) -> CacheFactory:
        """What caches are held to: all tokens, uncompressed."""
        return cache_factory("fp", self.model)

    def _reference_of(
        self, window: int, transform: str
    ) -> tuple[list[int], list[mx.array]]:
        """A window's tokens, and the uncompressed cache's scores of them."""
        key = (window, transform)
        if self._reference is None or self._reference[0] != key:
            self._reference = None  # let the older one go first
            tokens = self._window(window, self.plan.lengths[-1] + 1)
            logprobs = scoring.reference(self.model, tokens, self._exact, self.plan)
            self._reference = (key, tokens, logprobs)
        return self._reference[1:]

    def _score(self, cache: str, window: int, transform: str) -> KeyedJob:
        key = f"score {cache} window {window}"

        def job() -> Job:
            with _transformed(self.model, transform):
                tokens, reference = self._reference_of(window, transform)
                # The uncompressed cache is read in other chunks: its self-noise.
                prefill = self.plan.prefill // 2 or 1 if cache == "fp" else None
                spans = scoring.score(
                    self.model,
                    tokens,
                    self._factory(cache, window),
                    self.plan,
                    reference,
                    prefill,
                )
            return {
                "kind": "score",
                "name": cache,
                "window": window,
                "pathology": transform,
                "spans": spans,
            }

        return f"{key} {transform}" if transform else key, job

    def _layer(self, cache: str, layer: int) -> KeyedJob:
        def job() -> Job:
            tokens, reference = self._reference_of(0, "")
            compressed, plain = self._factory(cache, 0), self._exact

            def one_compressed() -> list[Any]:
                caches = plain()
                caches[layer] = compressed()[layer]
                return caches

            spans = scoring.score(
                self.model, tokens, one_compressed, self.plan, reference
            )
            return {"kind": "layer", "name": cache, "layer": layer, "spans": spans}

        return f"layer {layer} {cache}", job

    def _needle(self, cache: str, length: int) -> KeyedJob:
        def job() -> Job:
            answers = needles.retrieve(
                self.model,
                self.tokenizer,
                self._window(0, length),
                self._factory(cache, 0),
                self.plan.depths,
                self.plan.prefill,
            )
            return {"kind": "needle", "name": cache, "answers": answers}

        return f"needle {cache} length {length}", job

    def _greedy(self, cache: str, window: int) -> KeyedJob:
        def job() -> Job:
            if window not in self._greedy_texts:
                self._greedy_texts[window] = self._write(self._exact, window)
            tokens = self._write(self._factory(cache, window), window)
            same = needles.common_prefix(self._greedy_texts[window], tokens)
            return {"kind": "greedy", "name": cache, "window": window, "same": same}

        return f"greedy {cache} window {window}", job

    def _write(self, factory: CacheFactory, window: int) -> list[int]:
        plan = self.plan
        tokens = self._window(window, plan.lengths[0])
        return needles.greedy(self.model, tokens, factory, plan.greedy, plan.prefill)

    def _long(self, cache: str, window: int) -> KeyedJob:
        plan = self.plan

        def job() -> Job:
            own, questions = self._own_text(window)
            factory, plain = self._factory(cache, window), self._exact
            # The uncompressed cache is read in other steps: its self-noise.
            step = long.STEP // 2 if cache == "fp" else long.STEP
            scores, behind = long.divergence(
                self.model, own, factory, plain, plan.prefill, step
            )
            made = calls.make_calls(self.model, self.tokenizer, behind, questions)
            written = own.written[: plan.written]
            if cache != "fp":
                written = self._write_own(own.prompt, factory, plan.written, window)
            same = needles.common_prefix(own.written, written)
            return {
                "kind": "long",
                "name": cache,
                "window": window,
                **scores,
                "calls": made,
                "written": own.written if cache == "fp" else written,
                "parts": same,
                "repeats": round(long.repetition(written), 5),
            }

        return f"long {cache} window {window}", job

    def _own_text(
        self, window: int
    ) -> tuple[long.OwnText, list[tuple[float, str, str]]]:
        """What the model writes behind a window's prompt, and the facts in that."""
        prompt, questions = needles.haystack(
            self.tokenizer,
            self._window(window, long.PROMPT),
            long.FACTS,
            seed=window,
            is_distinct=True,
        )
        if window not in self.own_texts:
            self.own_texts[window] = self._write_own(
                prompt, self._exact, self.plan.long, window
            )
        written = self.own_texts[window]
        check_tokens(self.model, written, "the model's own text in results.json")
        return long.OwnText(prompt, written), questions

    def _write_own(
        self, prompt: list[int], factory: CacheFactory, count: int, window: int
    ) -> list[int]:
        return long.write(
            self.model, prompt, factory, count, self.plan.prefill, seed=window
        )

    def _bound(self, cache: str) -> KeyedJob:
        def job() -> Job:
            length = self.plan.lengths[0] if self.plan.lengths else bounds.TOKENS
            spec = CacheSpec.parse(cache)
            rows = bounds.measure(
                self.model, self._window(0, length), spec, self.plan.prefill
            )
            return {"kind": "bound", "name": cache, "length": length, "rows": rows}

        return f"bound {cache}", job


@contextlib.contextmanager
def _transformed(model: nn.Module, transform: str) -> Iterator[None]:
    if not transform:
        yield
        return
    with pathologies.injected(model, transform):
        yield

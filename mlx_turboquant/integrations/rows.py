"""Batches in which a row's fault ends that row only, and what it has read is kept.

Owns what goes between mlx-lm's batch and the code that a request brings along: its
sampler and its logits processors. A fault of theirs is remembered, the step goes on
with another token, and the row leaves with the fault as its reason to finish. A row
that leaves before its end, or is cut off in a step, is handed over to be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx_lm.server as host_server
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import greedy_sampler

from ..pacing import Interrupted

#: Takes a row's tokens, caches that have seen them, and whether they were cut off in a
#: step: then not all of its layers have seen that step's tokens.
Keep = Callable[[list[int], list[Any], bool], None]
_keep: ContextVar[Keep | None] = ContextVar("keep", default=None)


@contextlib.contextmanager
def keep_rows(keep: Keep) -> Iterator[None]:
    """Batches of this thread hand over rows that are given up."""
    before = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(before)


class RowFault(str):
    """A reason to finish that is a fault; its text says which."""


class GuardedBatch(BatchGenerator):  # type: ignore[misc]
    """mlx-lm's batch of requests, whose rows cannot fail one another."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._faults: dict[int, Exception] = {}
        self._keep = _keep.get()

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        *given: Any,
        samplers: Sequence[Any] | None = None,
        logits_processors: Sequence[Any] | None = None,
        **named: Any,
    ) -> list[int]:
        """Take requests in, as mlx-lm's does."""
        rows = range(self._uid_count, self._uid_count + len(segments))
        if samplers is not None:
            samplers = [
                self._guarded_sampler(row, sampler)
                for row, sampler in zip(rows, samplers, strict=True)
            ]
        if logits_processors is not None:
            logits_processors = [
                [self._guarded_processor(row, one) for one in processors]
                for row, processors in zip(rows, logits_processors, strict=True)
            ]
        taken: list[int] = super().insert_segments(
            segments,
            *given,
            samplers=samplers,
            logits_processors=logits_processors,
            **named,
        )
        return taken

    def _guarded_sampler(
        self, row: int, sampler: Callable[[mx.array], mx.array]
    ) -> Callable[[mx.array], mx.array]:
        is_shared = sampler is greedy_sampler
        if is_shared:
            return sampler  # cannot fail, and is called once for all rows

        def sample(logprobs: mx.array) -> mx.array:
            try:
                return sampler(logprobs)
            except Exception as fault:
                self._faults[row] = fault
                return mx.argmax(logprobs, axis=-1)

        return sample

    def _guarded_processor(self, row: int, process: Callable[..., mx.array]) -> Any:
        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            # A copy: processors write to what they are given, and may fail half-way.
            before = logits[:]
            try:
                return process(tokens, logits)
            except Exception as fault:
                self._faults[row] = fault
                return before

        return guarded

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step; rows with a fault finish, and their caches are kept as usual."""
        try:
            read, generated = super().next()
        except Interrupted:
            # Where it was written to in this step, an answer is at a step's end.
            self._keep_rows(self._generation_batch.uids)
            self._keep_rows(self._prompt_batch.uids, is_cut_off=True)
            raise
        for response in generated:
            fault = self._faults.pop(response.uid, None)
            if fault is None or response.finish_reason is not None:
                continue
            with mx.stream(self.stream):
                found = self.extract_cache([response.uid])
                response.prompt_cache, response.all_tokens = found[response.uid]
                super().remove([response.uid])
            response.finish_reason = RowFault(f"{type(fault).__name__}: {fault}")
        return read, generated

    def remove(self, uids: Sequence[int], *given: Any, **named: Any) -> Any:
        """Let rows go that nobody waits for, as mlx-lm's does."""
        self._keep_rows(uids)
        return super().remove(uids, *given, **named)

    def _keep_rows(self, uids: Iterable[int], is_cut_off: bool = False) -> None:
        if self._keep is None:
            return
        begun = {*self._prompt_batch.uids, *self._generation_batch.uids}
        with mx.stream(self.stream):
            found = self.extract_cache(begun.intersection(uids))
            for caches, tokens in found.values():
                self._keep(list(tokens), caches, is_cut_off)


def guard_batches() -> None:
    """Let mlx-lm's server make `GuardedBatch` in this process."""
    host_server.BatchGenerator = GuardedBatch

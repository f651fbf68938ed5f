"""Teacher-forced scores of a cache: what it does to the next token's distribution.

A window is read in long chunks up to a length, then in short chunks and single tokens
that are scored, at every length in turn, all through one cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .caches import CacheFactory, stored_bits
from .grid import EvalPlan


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``stop`` of a window, read ``step`` at a time."""

    length: int
    start: int
    stop: int
    step: int
    scored: bool
    last: bool = False  # of its length: bits are counted here


def spans(plan: EvalPlan, prefill: int) -> Iterator[Span]:
    """How a window is read."""
    done = 0
    for length in plan.lengths:
        chunked, stepped = length - plan.tail, length - plan.stepped
        yield Span(length, done, chunked, prefill, scored=False)
        yield Span(length, chunked, stepped, plan.chunk, scored=True)
        if plan.stepped:
            yield Span(length, stepped, length, 1, scored=True)
        done = length


def read(
    model: nn.Module,
    tokens: list[int],
    factory: CacheFactory,
    plan: EvalPlan,
    prefill: int | None = None,
) -> Iterator[tuple[Span, mx.array, list[Any]]]:
    """Log-probabilities (tokens, vocabulary) float32 of every scored span."""
    cache = factory()
    ids = mx.array(tokens)[None]
    for span in spans(plan, prefill or plan.prefill):
        rows = []
        for at in range(span.start, span.stop, span.step):
            part = ids[:, at : min(at + span.step, span.stop)]
            logits = model(part, cache=cache)[0] if span.scored else None
            if logits is None:
                model(part, cache=cache)
            else:
                logits = logits.astype(mx.float32)
                logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                rows.append(logits)
            mx.eval(rows[-1:], [layer.state for layer in cache])
        if span.scored:
            yield span, mx.concatenate(rows), cache


def reference(
    model: nn.Module, tokens: list[int], factory: CacheFactory, plan: EvalPlan
) -> list[mx.array]:
    """What `score` compares with: the log-probabilities of each scored span."""
    return [rows for _, rows, _ in read(model, tokens, factory, plan)]


def score(
    model: nn.Module,
    tokens: list[int],
    factory: CacheFactory,
    plan: EvalPlan,
    reference_rows: list[mx.array],
    prefill: int | None = None,
) -> list[dict[str, Any]]:
    """One entry per scored span, as JSON values.

    ``kld`` (nats) and ``nll`` are per token, ``same`` counts equal most likely tokens;
    ``bits`` and ``elements`` are the cache's at the end of the span.

    Args:
        model: The model.
        tokens: The window, at least the plan's longest length.
        factory: Makes the cache to score.
        plan: What to score.
        reference_rows: From `reference`, of the same window.
        prefill: Tokens at a time between lengths, if not the plan's.
    """
    scores = []
    spans_read = read(model, tokens, factory, plan, prefill)
    for (span, rows, cache), exact in zip(spans_read, reference_rows, strict=True):
        kld = mx.sum(mx.exp(exact) * (exact - rows), axis=-1)
        same = mx.sum(mx.argmax(exact, axis=-1) == mx.argmax(rows, axis=-1))
        truth = mx.array(tokens[span.start + 1 : span.stop + 1])[:, None]
        nll = -mx.take_along_axis(rows[: truth.shape[0]], truth, axis=-1)
        bits, elements = stored_bits(cache)
        scores.append(
            {
                "length": span.length,
                "mode": "stepped" if span.step == 1 else "chunked",
                "kld": [float(f"{x:.4g}") for x in np.array(kld)],
                "same": cast(int, same.item()),
                "nll": [round(float(x), 5) for x in np.array(nll)[:, 0]],
                "bits": round(bits),
                "elements": elements,
                "nbytes": sum(layer.nbytes for layer in cache),
            }
        )
    return scores

"""Tables of long generation and of bounds, for `report`."""

from __future__ import annotations

import itertools

import numpy as np

from .results import Evaluation, Job, interval

_PARTS = 4  # of a written text, each with its own divergence
Cells = list[list[str]]


def long_cells(results: Evaluation) -> tuple[list[str], Cells]:
    """Head and rows: what caches do to the model's own text.

    KLD by part of the text, front to back; ``last/first`` of those parts, over 1 if
    errors add up; ``repeats``, the share of runs of four tokens that the text a cache
    wrote had before; ``same text``, tokens until that text parts from the uncompressed
    cache's (median of windows); ``names`` and ``numbers`` copied right into calls.
    """
    jobs = results.of_kind("long")
    if not jobs:
        return [], []
    plan = results.about["plan"]
    edges = np.linspace(0, plan["long"], _PARTS + 1).astype(int)
    head = ["cache", "bits", "KLD", "95% interval"]
    head += [f"to {edge}" for edge in edges[1:]]
    head += ["last/first", "top-1", "repeats", "same text", "names", "numbers"]
    rows = []
    for name in dict.fromkeys(job["name"] for job in jobs):
        own = [job for job in jobs if job["name"] == name]
        klds = [np.array(job["kld"]) for job in own]
        means = [_mean(klds, a, b) for a, b in itertools.pairwise(edges)]
        low, high = interval(klds)
        tokens = sum(map(len, klds))
        bits = sum(j["bits"] for j in own) / sum(j["elements"] for j in own)
        ratio = means[-1] / means[0] if name != "fp" else 1.0
        parts = sorted(job["parts"] for job in own)[len(own) // 2]
        rows.append(
            [
                name,
                f"{bits:.2f}",
                f"{_mean(klds, 0, tokens):.3g}",
                f"{low:.3g}..{high:.3g}",
                *(f"{mean:.3g}" for mean in means),
                f"{ratio:.2f}",
                f"{100 * sum(job['same'] for job in own) / tokens:.1f}%",
                f"{100 * float(np.mean([job['repeats'] for job in own])):.1f}%",
                f"{min(parts, plan['written'])}/{plan['written']}",
                *(_right(own, argument) for argument in ("name", "code")),
            ]
        )
    return head, rows


def bound_cells(results: Evaluation) -> tuple[list[str], Cells]:
    """Head and rows: the error of attention, what was expected of it, its bound.

    Relative to the outputs' norm, the layer with the largest error and the mean of all;
    ``bound/error``: the least and the mean over layers.
    """
    jobs = results.of_kind("bound")
    head = ["cache", "tokens", "error", "expected", "bound", "largest error"]
    head += ["least bound/error", "bound/error", "error/expected"]
    rows = []
    for job in jobs:
        layers = job["rows"]
        true, expected, bound = (
            np.array([layer[key] for layer in layers])
            for key in ("true", "expected", "bound")
        )
        rows.append(
            [
                job["name"],
                str(job["length"]),
                *(f"{x.mean():.3g}" for x in (true, expected, bound)),
                f"{true.max():.3g}",
                f"{min(layer['least'] for layer in layers):.3g}",
                f"{(bound / true).mean():.3g}",
                f"{(true / expected).mean():.2f}",
            ]
        )
    return (head, rows) if rows else ([], [])


def _mean(klds: list[np.ndarray], start: int, stop: int) -> float:
    return float(np.concatenate([kld[start:stop] for kld in klds]).mean())


def _right(jobs: list[Job], argument: str) -> str:
    calls = [call for job in jobs for call in job["calls"]]
    return f"{sum(call[argument] for call in calls)}/{len(calls)}"

"""Bits chosen by layer against fixed rules, at equal mean bits.

Rules: the same bits everywhere; early boost (one bit more in the first layers, as in
TurboAngle, arXiv 2603.27467); boundary layers (one bit more in the first and the last
ones); keys first (k4v3); and this package's choice from the text's first page. The
second model is the bundled one with three times sharper attention in two layers, where
a fixed rule cannot know. KLD over windows and seeds, 1,024 tokens. Last line JSON.

    python benchmarks/bench_allocation.py [WINDOWS]
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_turboquant.blas import prefer_openblas

prefer_openblas()

import numpy as np  # noqa: E402

import mlx_turboquant as tq  # noqa: E402
from mlx_turboquant.evals import caches, results, scoring, text  # noqa: E402
from mlx_turboquant.integrations.hook import install  # noqa: E402

MODEL = Path(__file__).parent.parent / "examples" / "books-20m"
PLAN = tq.EvalPlan(lengths=(1024,), scored=192, stepped=0)
SHARP = (3, 5)  # layers, counted from 0


def rules(layers: int, more: int) -> dict[str, Callable[[int], str]]:
    """Per rule, the spec of a layer; ``more`` layers get one bit more than 3."""
    half = more // 2
    return {
        "early boost": lambda i: "4" if i < more else "3",
        "boundary": lambda i: "4" if i < half or i >= layers - half else "3",
    }


@contextlib.contextmanager
def sharpened(model: Any, factor: float) -> Iterator[None]:
    """The model with sharper attention in some layers."""
    chosen = [model.model.layers[i].self_attn for i in SHARP]
    scales = [attention.scale for attention in chosen]
    for attention in chosen:
        attention.scale *= factor
    yield
    for attention, scale in zip(chosen, scales, strict=True):
        attention.scale = scale


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    model, tokenizer = tq.load(str(MODEL))
    layers = len(model.layers)
    install(model)
    windows = text.windows(text.books(), tokenizer, 1025, count)
    factories: dict[str, Callable[[int], caches.CacheFactory]] = {}
    for spec in ("3", "auto,budget=3", "auto,budget=3.25", "3.5", "auto,budget=3.5"):
        factories[spec] = lambda seed, spec=spec: caches.cache_factory(
            spec, model, seed
        )
    for more in (2, 4):
        for name, rule in rules(layers, more).items():
            factories[f"{name} {3 + more / layers:g}"] = lambda seed, rule=rule: (
                lambda: [
                    tq.TurboQuantCache(f"{rule(i)},seed={seed}") for i in range(layers)
                ]
            )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for factor in (1.0, 3.0):
        rows = found[f"sharpened {factor:g}"] = {}
        spans: dict[str, list[dict[str, Any]]] = {name: [] for name in factories}
        with sharpened(model, factor):
            for seed, tokens in enumerate(windows):
                fp = caches.cache_factory("fp", model)
                base = scoring.reference(model, tokens, fp, PLAN)
                for name, factory in factories.items():
                    spans[name] += scoring.score(
                        model, tokens, factory(seed % 3), PLAN, base
                    )
        print(f"\nattention of layers {SHARP} sharpened {factor:g} times")
        for name, some in spans.items():
            kld = [np.array(span["kld"]) for span in some]
            low, high = results.interval(kld)
            bits = some[0]["bits"] / some[0]["elements"]
            rows[name] = {"bits": bits, "kld": float(np.concatenate(kld).mean())}
            print(
                f"{name:20s} {bits:6.3f} bits  KLD {rows[name]['kld']:.5f} "
                f"({low:.5f}..{high:.5f})",
                flush=True,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()

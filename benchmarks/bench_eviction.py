"""What is lost when a cache is bounded: by age, and by score.

Of a text longer than ``--max-kv-size``: KL divergence of the next token's distribution
against the unbounded, uncompressed cache, and how many facts hidden in it are found.
Facts are asked for when the text has been read, so nothing told the cache about them.

    python benchmarks/bench_eviction.py --model examples/books-20m

On the bundled model a few minutes on a GPU, half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import platform

import mlx_turboquant as tq  # isort: skip

import mlx.core as mx
from mlx_lm.utils import dequantize_model

from mlx_turboquant.evals import needles, scoring, text
from mlx_turboquant.evals.caches import cache_factory

LENGTH, NEEDLE_LENGTH, DEPTHS = 4096, 3500, 6
PLAN = tq.EvalPlan(lengths=(LENGTH,), scored=512, stepped=0, chunk=16)
#: Windows that the shares of `page_scores` were chosen on, and that are left out.
SEEN = 5


def unseen(windows: list[list[int]], count: int) -> list[list[int]]:
    """So many windows that share next to nothing with each other, nor with `SEEN`."""
    chosen: list[list[int]] = []
    known: set[tuple[int, ...]] = set()
    for index, window in enumerate(windows):
        runs = set(zip(*(window[i:] for i in range(8)), strict=False))
        if index >= SEEN and len(runs & known) < 0.05 * len(runs):
            chosen.append(window)
        known |= runs
    return chosen[:count]


def main() -> None:
    """Print a row for each cache and limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/books-20m")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 1024, 512])
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--specs", nargs="+", default=["k3v3,page=128", "k3v3,page=32"])
    args = parser.parse_args()
    model, tokenizer = tq.load(args.model)
    dequantize_model(model)
    model.set_dtype(mx.float32)
    books = text.read_texts(None)
    windows, haystacks = (
        unseen(text.windows(books, tokenizer, length, 4 * args.windows), args.windows)
        for length in (LENGTH, NEEDLE_LENGTH)
    )
    exact = cache_factory("fp", model)
    references = [scoring.reference(model, w, exact, PLAN) for w in windows]
    print(f"# MLX {mx.__version__}, {mx.default_device()}, {platform.machine()}")
    print(
        f"# {args.model}: {LENGTH} tokens, {PLAN.tail} scored; facts in {NEEDLE_LENGTH}"
    )
    print(f"{'cache':34} {'tokens':>6} {'KLD':>8}  by window {'':72} facts      MB")

    def row(name: str, cache: str, size: int | None) -> None:
        make = cache_factory(cache, model, max_kv_size=size)
        divergences = []
        for window, rows in zip(windows, references, strict=True):
            (span,) = scoring.score(model, window, make, PLAN, rows)
            divergences.append(sum(span["kld"]) / len(span["kld"]))
        held = span["bits"] / 8e6
        facts = [
            answer["found"]
            for text_ids in haystacks
            for answer in needles.retrieve(
                model, tokenizer, text_ids, make, DEPTHS, PLAN.prefill
            )
        ]
        by_window = " ".join(f"{kld:.5f}" for kld in divergences)
        mean = sum(divergences) / len(divergences)
        of = f"{sum(facts)}/{len(facts)}"
        cells = f"{size or LENGTH:6} {mean:8.5f}  {by_window:82} {of:>6} {held:7.2f}"
        print(f"{name:34} {cells}", flush=True)

    row("uncompressed", "fp", None)
    for size in args.sizes:
        row("mlx-lm --max-kv-size", "fp", size)
        for spec in args.specs:
            for evict in ("sliding", "score"):
                name = f"{spec},evict={evict}"
                row(name, name, size)


if __name__ == "__main__":
    main()

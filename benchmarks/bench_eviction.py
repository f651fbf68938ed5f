"""What is lost when a cache is bounded: by age, and by score.

Of a text longer than ``--max-kv-size``: KL divergence of the next token's distribution
against the unbounded, uncompressed cache, and how many facts hidden in it are found.
Facts are asked for when the text has been read, so nothing told the cache about them.

    python benchmarks/bench_eviction.py --model examples/books-20m

On the bundled model a few minutes on a GPU, half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from typing import Any

import mlx_turboquant as tq  # isort: skip

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model

from mlx_turboquant.evals import needles, text
from mlx_turboquant.evals.caches import stored_bits
from mlx_turboquant.integrations.stock import stock_caches

LENGTH, NEEDLE_LENGTH, TAIL, PREFILL, DEPTHS = 4096, 3500, 512, 512, 6
#: Windows that the shares of `page_scores` were chosen on, and that are left out.
SEEN = 5
Maker = Callable[[], list[Any]]


def score(model: nn.Module, tokens: list[int], cache: list[Any]) -> mx.array:
    """Of the last `TAIL` tokens, read 16 at a time."""
    ids = mx.array(tokens)[None]
    needles.read(model, tokens[:-TAIL], cache, PREFILL)
    rows = []
    for start in range(len(tokens) - TAIL, len(tokens), 16):
        logits = model(ids[:, start : start + 16], cache=cache)[0].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(rows[-1])
    return mx.concatenate(rows)


def found(model: nn.Module, tokenizer: Any, tokens: list[int], make: Maker) -> int:
    """How many of `DEPTHS` facts are found, each asked of a copy of the cache."""
    text_ids, questions = needles.haystack(tokenizer, tokens, DEPTHS)
    cache, count = make(), 0
    needles.read(model, text_ids, cache, PREFILL)
    for _, question, code in questions:
        asked = needles.ids_of(tokenizer, question)
        answer = needles.continuation(model, asked, copy.deepcopy(cache), 10)
        count += code in tokenizer.decode(answer).replace(" ", "")
    return count


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
    exact = [score(model, w, stock_caches(model)) for w in windows]
    print(f"# MLX {mx.__version__}, {mx.default_device()}, {platform.machine()}")
    print(f"# {args.model}: {LENGTH} tokens, {TAIL} scored; facts in {NEEDLE_LENGTH}")
    print(f"{'cache':34} {'tokens':>6} {'KLD':>8}  by window {'':72} facts      MB")

    def row(name: str, size: int | None, make: Maker) -> None:
        divergences = []
        for window, rows in zip(windows, exact, strict=True):
            cache = make()
            got = score(model, window, cache)
            kld = mx.mean(mx.sum(mx.exp(rows) * (rows - got), axis=-1))
            divergences.append(float(kld))
        held = stored_bits(cache)[0] / 8e6
        facts = [found(model, tokenizer, h, make) for h in haystacks]
        by_window = " ".join(f"{kld:.5f}" for kld in divergences)
        mean = sum(divergences) / len(divergences)
        of = f"{sum(facts)}/{DEPTHS * len(facts)}"
        cells = f"{size or LENGTH:6} {mean:8.5f}  {by_window:82} {of:>6} {held:7.2f}"
        print(f"{name:34} {cells}", flush=True)

    row("uncompressed", None, lambda: stock_caches(model))
    for size in args.sizes:
        row("mlx-lm --max-kv-size", size, lambda s=size: stock_caches(model, s))
        for spec in args.specs:
            for evict in ("sliding", "score"):
                full = f"{spec},evict={evict}"
                row(
                    full, size, lambda s=size, f=full: tq.make_prompt_cache(model, f, s)
                )


if __name__ == "__main__":
    main()

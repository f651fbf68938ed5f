"""Whole decode steps: their time, the host's part, what a replayed graph would save.

A made-up model (random weights, bf16) decodes behind a prompt, uncompressed and with
our cache; rounds alternate, so that a busy machine slows them alike. Per cache:

    step        milliseconds a step, each waiting for the one before it
    host        of them, the main thread's: building the graph and handing it over
    frozen      a step that stores nothing: its caches stay as the prompt left them,
                so keys and values of the token are not even computed
    replayed    the same under ``mx.compile``: no compiled step can be faster, so the
                uncompressed cache's is what one of mlx-lm's would reach at best
    compiled    a step of ``tq.compiled(model)``. Ours only
    mean        of all rounds but the first. The others are medians, which leave out
                page turns, and traces with them

First, 64 greedy tokens of the compiled model are held to the model's own.

    python benchmarks/bench_step.py [TOKENS ...] [--shape 8b|1b] [--specs SPEC ...]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from bench_generate import SHAPES, made_up, prefill
from mlx_lm.models.cache import make_prompt_cache

import mlx_turboquant as tq

STEPS, ROUNDS = 16, 7
#: Tokens that a compiled model has to choose as the model does.
SAME = 64
Step = Callable[[mx.array], mx.array]


class Frozen:
    """A layer's cache that shows what it holds and stores nothing.

    Args:
        cache: The cache, one of ours or mlx-lm's.
    """

    _fetched: tuple[Any, ...]

    def __init__(self, cache: Any) -> None:
        self.offset = cache.offset
        if isinstance(cache, tq.TurboQuantCache):
            self._fetched = cache.compressed()
        else:
            held = cache.keys, cache.values
            self._fetched = tuple(side[:, :, : cache.offset] for side in held)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """What it holds."""
        keys, values = self._fetched
        return keys, values

    def make_mask(self, *_: Any, **__: Any) -> None:
        """None: one query sees all."""
        return


def prefilled(model: Any, cache: list[Any], tokens: int) -> list[Any]:
    """The cache with a prompt of so many tokens."""
    prefill(model, cache, mx.random.randint(5, 1000, (1, tokens)))
    mx.clear_cache()
    return cache


def greedy(model: Any, cache: list[Any]) -> Step:
    """From a token to the next one."""
    return lambda token: mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)


def times_ms(step: Step) -> tuple[float, float]:
    """Milliseconds a step, and of the main thread for one."""
    token = mx.array([[1]], mx.uint32)  # as samplers give them
    mx.eval(token)
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(STEPS):
        token = step(token)
        mx.async_eval(token)
    host = time.thread_time() - cpu
    mx.eval(token)
    return (time.perf_counter() - wall) / STEPS * 1e3, host / STEPS * 1e3


def chosen(step: Step) -> list[int]:
    """The first tokens that greedy steps choose."""
    tokens = [mx.array([[1]], mx.uint32)]
    for _ in range(SAME):
        tokens.append(step(tokens[-1]))
        mx.async_eval(tokens[-1])
    return [int(token.item()) for token in tokens[1:]]


def equal_tokens(model: Any, cache: list[Any]) -> int:
    """How many of them a compiled model chooses as the model does."""
    models = model, tq.compiled(model)
    ours, compiled = (chosen(greedy(one, copy.deepcopy(cache))) for one in models)
    return sum(a == b for a, b in zip(ours, compiled, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", nargs="*", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--specs", nargs="+", default=["k3v3"])
    options = parser.parse_args()
    mx.random.seed(0)
    model = made_up(options.shape)
    report: dict[int, dict[str, dict[str, float]]] = {}
    for tokens in options.tokens:
        steps: dict[tuple[str, str], Step] = {}
        for name in ("stock", *options.specs):
            made = tq.make_prompt_cache(model, name) if name != "stock" else None
            cache = prefilled(model, made or make_prompt_cache(model), tokens)
            steps[name, "step"] = greedy(model, cache)
            if made is not None:
                equal = equal_tokens(model, made)
                print(f"{tokens:7} {name:12} {equal} of {SAME} tokens are equal")
                copied = copy.deepcopy(made)
                steps[name, "compiled"] = greedy(tq.compiled(model), copied)
            still: list[Any] = [Frozen(layer) for layer in cache]
            steps[name, "frozen"] = greedy(model, still)
            steps[name, "replayed"] = mx.compile(greedy(model, still))
        rounds: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(ROUNDS + 1):
            for key, step in steps.items():
                rounds.setdefault(key, []).append(times_ms(step))
        report[tokens] = {}
        for (name, kind), pairs in rounds.items():
            # The first round builds kernels.
            wall, host = (
                round(statistics.median(column), 2)
                for column in zip(*pairs[1:], strict=True)
            )
            row = report[tokens].setdefault(name, {})
            row[kind] = wall
            row[f"{kind} host"] = host
            row[f"{kind} mean"] = round(statistics.mean(w for w, _ in pairs[1:]), 2)
        for name, row in report[tokens].items():
            text = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row.items())
            ratio = report[tokens]["stock"]["step"] / row["step"]
            print(f"{tokens:7} {name:12} {text}; {ratio:.2f} of stock", flush=True)
        del steps, cache, made
        mx.clear_cache()
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(json.dumps({"device": device, "shape": options.shape, "ms": report}))


if __name__ == "__main__":
    main()

"""Many conversations at once: whole batched steps, forks, prefixes, long decoding.

Random weights (Llama-3.1-8B's or 3.2-1B's shape), bf16, or for CPUs the bundled model
in float32; caches are filled with random keys and values. Without options, whole greedy
steps of a batch, as mlx-lm's servers take them: stock is its `BatchKVCache`, ours
`BatchTurboQuantCache`; rounds of both alternate, the mean is given. Rows of a batch
differ in length by up to a page, so that they pack at different steps.

    python benchmarks/bench_batch.py [--shape 8b|1b|books] [--rows N ...]
        [--tokens N ...] [--spec k3v3]
    python benchmarks/bench_batch.py --attention [--spec k3v3]
        attention alone, in calls that wait for each other: rows of equal length beside
        MLX's on fp16, several query tokens, rows that differ, and 8 rows of 8,192 over
        one of 65,536
    python benchmarks/bench_batch.py --forks [--tokens N]
        milliseconds and bytes of a fork; bytes of four conversations whose first
        tokens are the same
    python benchmarks/bench_batch.py --long STEPS [--tokens N]
        milliseconds between the tokens of a long answer, stock's and ours, one in
        flight and free buffers let go every 256 as mlx-lm does: median, the slowest
        behind the first 16, how many took over twice the median; what MLX's cache of
        free buffers held

The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import bench_attention
from bench_generate import BUNDLED, decode, fill, made_up  # first: see there

# isort: split
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import mlx_turboquant as tq
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.kernels.kernel import MlxLauncher

#: Together a page of each row: every row turns one page.
STEPS, ROUNDS = 16, 8
#: Rows of a batch that differ much.
RAGGED = (32768, 8192, 8192, 4096, 4096, 4096, 2048, 2048)


def filled(model: Any, cache: list[Any], tokens: int) -> list[Any]:
    """A sequence of so many random tokens, and one of the model's own."""
    fill(model, cache, tokens)
    mx.eval(model(mx.ones((1, 1), mx.int32), cache=cache))
    return cache


def model_of(shape: str) -> Any:
    """A made-up model, or the bundled one with its weights as a CPU likes them."""
    if shape != "books":
        return made_up(shape)
    model, _ = tq.load(str(BUNDLED))
    model.set_dtype(mx.float32)
    return model


def batch_of(model: Any, make: Any, lengths: list[int]) -> list[Any]:
    """A batched prompt cache of sequences of these lengths."""
    rows = [filled(model, make(), length) for length in lengths]
    batch = [type(layers[0]).merge(layers) for layers in zip(*rows, strict=True)]
    decode(model, batch, 2, len(lengths))
    return batch


def makers(model: Any, spec: str) -> dict[str, Any]:
    """What makes stock's prompt cache, and ours."""
    return {
        "uncompressed": lambda: make_prompt_cache(model),
        spec: lambda: tq.make_prompt_cache(model, spec),
    }


def steps_of_batches(
    model: Any, rows: int, tokens: int, spec: str
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step and bytes, stock's and ours."""
    lengths = [tokens - 128 * i // rows for i in range(rows)]
    batches = {}
    for name, make in makers(model, spec).items():
        batches[name] = batch_of(model, make, lengths)
        mx.clear_cache()
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(ROUNDS):
        for name, batch in batches.items():
            times[name].append(1e3 / decode(model, batch, STEPS, rows))
    return {
        name: {
            "ms": statistics.mean(times[name]),
            "mb": sum(layer.nbytes for layer in batch) / 1e6,
        }
        for name, batch in batches.items()
    }


def attention(spec: str) -> dict[str, float]:
    """Microseconds of a layer's attention, both launches and the host included."""
    launcher = MlxLauncher("metal" if mx.metal.is_available() else "cuda")
    backend = Gpu(launcher)
    base = bench_attention.LLAMA._replace(dtype="bfloat16")
    report: dict[str, float] = {}

    def line(lengths: int | Sequence[int], rows: int, steps: int = 1) -> float:
        shape = base._replace(batch=rows, steps=steps)
        call = bench_attention.packed(backend, spec, lengths, shape)
        name = f"{rows} x {lengths}, {steps} queries"
        ours = report[name] = bench_attention.dependent_us(call, shape)
        print(f"{name:72} {ours:7.1f}", end="")
        if isinstance(lengths, int):
            plain = bench_attention.fp16(lengths, shape)
            stock = bench_attention.dependent_us(plain, shape)
            report[f"{name}, fp16"] = stock
            print(f" {stock:7.1f}", end="")
        print(flush=True)
        return ours

    print(f"{'rows x tokens, queries of a row':72} {'ours':>7} {'fp16':>7}")
    for tokens in (4096, 16384):
        for rows in (1, 4, 8, 16):
            line(tokens, rows)
    for steps in (4, 8, 16):
        line(16384, 1, steps)
        line(4096, 8, steps)
    line(RAGGED, len(RAGGED))
    ratio = line(8192, 8) / line(65536, 1)
    print(f"8 rows of 8,192 over one of 65,536: {ratio:.2f}")
    return report


def forks(model: Any, tokens: int, spec: str) -> dict[str, float]:
    """A fork's time and bytes, and what conversations with one beginning hold."""
    first = filled(model, tq.make_prompt_cache(model, spec), tokens)
    mx.clear_cache()
    alone = sum(layer.nbytes for layer in first)
    before = mx.get_active_memory()
    times, conversations = [], [first]
    for _ in range(21):
        start = time.perf_counter()
        fork = copy.deepcopy(first)
        times.append(1e3 * (time.perf_counter() - start))
    bytes_of_forks = mx.get_active_memory() - before
    conversations += [copy.deepcopy(first) for _ in range(3)]
    for cache in conversations:
        decode(model, cache, 200)
    del fork, cache
    mx.clear_cache()
    held = mx.get_active_memory() - before + alone
    return {
        "fork_ms": statistics.median(times),
        "fork_mb": bytes_of_forks / 1e6,
        "one_mb": alone / 1e6,
        "four_mb": held / 1e6,
    }


def long_answer(model: Any, cache: list[Any], steps: int) -> dict[str, float]:
    """Milliseconds between tokens, and the most that MLX's cache held."""
    mx.clear_cache()
    token = mx.ones((1, 1), mx.int32)
    times, free = [], []
    start = time.perf_counter()
    for step in range(steps):
        following = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.async_eval(following)
        mx.eval(token)
        token = following
        now = time.perf_counter()
        times.append(1e3 * (now - start))
        start = now
        free.append(mx.get_cache_memory() / 1e6)
        if step % 256 == 255:
            mx.clear_cache()
    median = statistics.median(times)
    late = sorted(times[16:])
    return {
        "median_ms": median,
        "slowest_ms": late[-1],
        "p999_ms": late[int(0.999 * len(late)) - 1],
        "over_twice": sum(t > 2 * median for t in late),
        "free_mb_early": max(free[: steps // 4]),
        "free_mb": max(free),
        "cache_mb": sum(layer.nbytes for layer in cache) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("8b", "1b", "books"), default="8b")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--spec", default="k3v3")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--forks", action="store_true")
    parser.add_argument("--long", type=int, default=0)
    options = parser.parse_args()
    mx.random.seed(0)
    report: dict[str, Any] = {}
    if options.attention:
        report = attention(options.spec)
    elif options.forks or options.long:
        model = model_of(options.shape)
        (tokens,) = options.tokens or [32768]
        if options.forks:
            report["forks"] = forks(model, tokens, options.spec)
        if options.long:
            for name, make in makers(model, options.spec).items():
                cache = filled(model, make(), tokens)
                report[f"long, {name}"] = long_answer(model, cache, options.long)
        for name, row in report.items():
            print(f"{name}, {tokens} tokens")
            for key, value in row.items():
                print(f"  {key:14} {value:10.3f}")
    else:
        model = model_of(options.shape)
        print("rows x tokens    ms, uncompressed     ours  x plain   MB, un.    ours")
        for tokens in options.tokens or [4096, 16384]:
            for rows in options.rows:
                row = steps_of_batches(model, rows, tokens, options.spec)
                report[f"{rows}x{tokens}"] = row
                stock, ours = row.values()
                print(
                    f"{rows:4} x {tokens:6} {stock['ms']:22.2f} {ours['ms']:8.2f} "
                    f"{ours['ms'] / stock['ms']:8.2f} {stock['mb']:9.0f} "
                    f"{ours['mb']:7.0f}",
                    flush=True,
                )
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(json.dumps({"device": device, "mlx": mx.__version__, "rows": report}))


if __name__ == "__main__":
    main()

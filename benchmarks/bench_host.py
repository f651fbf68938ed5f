"""What one layer's decode step costs the host: Python frames, files, microseconds.

    python benchmarks/bench_host.py [--layers 32] [--list]

From ``update_and_fetch`` to the launches, which a stand-in takes and does nothing with:
so this counts Python and lazy MLX calls, never kernels, and needs no GPU. Stock is
mlx-lm's ``KVCache`` with its own attention function. A step of all layers is timed, as
a model takes it, without evaluation; medians of 15, of one layer's share.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

import mlx_turboquant as tq
from mlx_turboquant.backends import select
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.integrations.hook import attend_or
from mlx_turboquant.kernels.kernel import Launch

KV_HEADS, QUERY_HEADS, DIM, TOKENS, SCALE = 8, 32, 128, 516, 0.09
PACKAGE = Path(tq.__file__).parent
attend = attend_or(scaled_dot_product_attention)


class NoLauncher:
    """Takes launches and returns zeros made before: the host's work without MLX's."""

    name = "cuda"

    def __init__(self) -> None:
        self._outputs: dict[int, list[mx.array]] = {}

    def __call__(self, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
        """The same zeros for every call of a launch."""
        outputs = self._outputs.get(id(launch))
        if outputs is None:
            pairs = zip(launch.output_shapes, launch.output_dtypes, strict=True)
            outputs = [mx.zeros(shape, dtype) for shape, dtype in pairs]
            mx.eval(outputs)
            self._outputs[id(launch)] = outputs
        return outputs


def tensors(heads: int, tokens: int) -> mx.array:
    x = mx.random.normal((1, heads, tokens, DIM)).astype(mx.float16)
    mx.eval(x)
    return x


def our_cache() -> tq.TurboQuantCache:
    cache = tq.TurboQuantCache("k3v3")
    gpu, select.gpu_backend = select.gpu_backend, lambda: None
    for count in (TOKENS - 1, 1):  # encoded without kernels
        cache.update_and_fetch(tensors(KV_HEADS, count), tensors(KV_HEADS, count))
    select.gpu_backend = gpu
    mx.eval(cache.state)
    # The backend that encoded was the CPU's; a copy asks again.
    return tq.TurboQuantCache.from_state(cache.state)


def stock_cache() -> KVCache:
    cache = KVCache()
    cache.update_and_fetch(tensors(KV_HEADS, TOKENS), tensors(KV_HEADS, TOKENS))
    mx.eval(cache.state)
    return cache


def our_step(cache, q, k, v):
    keys, values = cache.update_and_fetch(k, v)
    return attend(q, keys, values, cache, SCALE, None)


def stock_step(cache, q, k, v):
    keys, values = cache.update_and_fetch(k, v)
    return scaled_dot_product_attention(q, keys, values, cache, scale=SCALE, mask=None)


def calls_of(step) -> tuple[collections.Counter, collections.Counter, int]:
    """Python frames by file and function, files, and C calls of ``step``."""
    frames: collections.Counter = collections.Counter()
    files: collections.Counter = collections.Counter()
    c_calls = 0

    def profile(frame, event, arg):
        nonlocal c_calls
        path = frame.f_code.co_filename
        if event == "call" and not path.endswith("bench_host.py"):
            name = path.split("site-packages/")[-1]
            if Path(path).is_relative_to(PACKAGE):
                name = str(Path(path).relative_to(PACKAGE))
            files[name] += 1
            frames[f"{name}:{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            c_calls += 1

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return frames, files, c_calls


def microseconds(step, caches, q, k, v) -> float:
    times = []
    for _ in range(15):
        start = time.perf_counter()
        for cache in caches:
            step(cache, q, k, v)
        times.append(1e6 * (time.perf_counter() - start) / len(caches))
        mx.eval([cache.state for cache in caches])
        for cache in caches:
            cache.trim(1)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--list", action="store_true", help="print every frame")
    options = parser.parse_args()
    backend = Gpu(NoLauncher())
    select.gpu_backend = lambda: backend
    q, k, v = tensors(QUERY_HEADS, 1), tensors(KV_HEADS, 1), tensors(KV_HEADS, 1)
    for name, make, step in (
        ("stock", stock_cache, stock_step),
        ("k3v3", our_cache, our_step),
    ):
        caches = [make() for _ in range(options.layers)]
        for _ in range(3):
            for cache in caches:
                step(cache, q, k, v)
        frames, files, c_calls = calls_of(partial(step, caches[0], q, k, v))
        mx.eval([cache.state for cache in caches])
        spent = microseconds(step, caches, q, k, v)
        print(
            f"{name}: {frames.total()} Python frames in {len(files)} files, "
            f"{c_calls} C calls, {spent:.1f} us a layer"
        )
        if options.list:
            for frame, count in frames.items():
                print(f"  {count} {frame}")


if __name__ == "__main__":
    main()

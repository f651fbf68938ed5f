"""One decode attention over a long cache: fused kernel, fp16, and mlx-lm's 4 bits.

Llama-3.1-8B's shape (32 query heads, 8 KV heads, head_dim 128), one query token, on
whatever GPU MLX finds. Every kernel is first checked against the reference backend.
Times are medians over repeats of `CALLS` calls in one evaluation, which hides the
host; inputs rotate so that no call finds its codes in cache. The last line is JSON.

    python benchmarks/bench_decode.py [LENGTH ...]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

import mlx_turboquant as tq
from mlx_turboquant.backends import gpu, reference
from mlx_turboquant.codecs import codec_for
from mlx_turboquant.codes import PackedCodes
from mlx_turboquant.kernels.kernel import MlxLauncher
from mlx_turboquant.segments import Segments

HEADS, GROUP, DIM = 8, 4, 128
CALLS, REPEATS = 16, 7
SPECS = ("k2v2", "k3v3", "k4v3", "k4v4", "k8v4", "k8v8")


def made_up(spec: str, length: int) -> tuple[Segments, Segments]:
    """Segments over random tokens: 4 sinks, 64 recent, the rest packed."""
    parsed = tq.CacheSpec.parse(spec)
    sides = []
    for side, codec_spec in (("keys", parsed.keys), ("values", parsed.values)):
        codec = codec_for(codec_spec, DIM, side, 0)
        parts: dict[str, list[mx.array]] = {"words": [], "scales": []}
        for start in range(0, length, 16384):
            count = min(16384, length - start)
            codes = codec.encode(mx.random.normal((1, HEADS, count, DIM)))
            for name, array in codes.arrays.items():
                parts[name].append(array)
                mx.eval(array)
        arrays = {name: mx.concatenate(p, axis=2) for name, p in parts.items()}
        mx.eval(arrays)
        ends = [
            mx.random.normal((1, HEADS, n, DIM)).astype(mx.float16) for n in (4, 64)
        ]
        mean = mx.random.normal((1, HEADS, 1, DIM)) if side == "keys" else None
        sides.append(
            Segments(codec, ends[0], PackedCodes(arrays, length), ends[1], mean)
        )
    mx.eval([s.sink for s in sides], [s.recent for s in sides])
    return sides[0], sides[1]


def median_us(call: Callable[[mx.array], mx.array]) -> float:
    """Microseconds of one call, host time hidden by evaluating many at once."""
    times = []
    for _ in range(REPEATS + 2):
        queries = [
            mx.random.normal((1, HEADS * GROUP, 1, DIM)).astype(mx.float16)
            for _ in range(CALLS)
        ]
        mx.eval(queries)
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([call(q) for q in queries])
        mx.synchronize()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times[2:])


def affine(length: int, bits: int) -> Callable[[mx.array], mx.array]:
    """mlx-lm's quantized attention: two quantized products and a softmax."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as attention

    kv = [
        mx.quantize(
            mx.random.normal((1, HEADS, length, DIM)).astype(mx.float16),
            group_size=64,
            bits=bits,
        )
        for _ in range(2)
    ]
    mx.eval(kv)
    return lambda q: attention(q * 1.0, *kv, 0.09, None, 64, bits)


def fp16(length: int) -> Callable[[mx.array], mx.array]:
    """MLX's own attention on an uncompressed cache."""
    kv = [
        mx.random.normal((1, HEADS, length, DIM)).astype(mx.float16) for _ in range(2)
    ]
    mx.eval(kv)
    return lambda q: mx.fast.scaled_dot_product_attention(q, *kv, scale=0.09)


def check(backend: gpu.Gpu, spec: str) -> float:
    """Relative error of the kernel against the reference at 3,000 tokens."""
    keys, values = made_up(spec, 3000)
    q = mx.random.normal((1, HEADS * GROUP, 1, DIM)).astype(mx.float16)
    got = backend.attend_rot(q.astype(mx.float32), keys, values, 0.09)
    want = reference.attend_rot(q.astype(mx.float32), keys, values, 0.09)
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()


def main() -> None:
    lengths = [int(a) for a in sys.argv[1:]] or [4096, 32768, 131072]
    dialect = "metal" if mx.metal.is_available() else "cuda"
    backend = gpu.Gpu(MlxLauncher(dialect))
    for spec in SPECS:
        print(f"{spec}: error against the reference {check(backend, spec):.1e}")
    rows = {}
    for length in lengths:
        base = median_us(fp16(length))
        row = {"fp16": base, "mlx-lm kv_bits=4": median_us(affine(length, 4))}
        for spec in SPECS:
            keys, values = made_up(spec, length)
            row[spec] = median_us(
                lambda q, k=keys, v=values: backend.attend_rot(q, k, v, 0.09)
            )
        rows[length] = row
        shown = "  ".join(f"{k} {v:.0f} us ({base / v:.2f}x)" for k, v in row.items())
        print(f"{length} tokens: {shown}", flush=True)
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(json.dumps({"device": device, "mlx": mx.__version__, "us": rows}))


if __name__ == "__main__":
    main()

"""One decode attention over a long cache: fused kernels, fp16, and mlx-lm's 4 bits.

Llama-3.1-8B's shape (32 query heads, 8 KV heads, head_dim 128), one query token, on
whatever GPU MLX finds. Every codec is first checked against the reference backend.
Times are medians over repeats of `CALLS` calls in one evaluation, whose graph is built
before the clock starts. The calls are independent, so a GPU runs them side by side:
these are throughputs, not what a step waits for, whose layers run one after the other
(results/house-h100.txt has kernels one by one and dependent calls). "kernel" is the
slope between the two longest lengths, where a call's constant costs drop out. GB/s
counts the bytes a call must read (codes and scales; fp16: keys and values), "of copy"
is that over the bandwidth of large copies in the same run. The last line is JSON.

    python benchmarks/bench_attention.py [LENGTH ...]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

import mlx_turboquant as tq
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.codecs import codec_for
from mlx_turboquant.kernels.kernel import MlxLauncher
from mlx_turboquant.quantizer import PageMeans, Quantizer
from mlx_turboquant.segments import CompressedTokens
from mlx_turboquant.tokens import TokenArrays
from mlx_turboquant.transform import ChannelTransform

HEADS, GROUP, DIM = 8, 4, 128
CALLS, REPEATS = 64, 7
SPECS = (
    "k2v2",
    "k3v3",
    "k4v4",
    "k8v8",
    "k4v4,codec=rotated-int4",
    "k3v3,codec=research.turboangle-fixed",
    "k2v2,codec=trellis",
    "k3v3,codec=trellis",
    "k3.5v3.5,codec=trellis",
    "k4v4,codec=trellis",
    "k3v2,codec=trellis",
)
#: Tokens that are encoded; longer caches repeat them.
_DISTINCT = 4096
Attention = Callable[[mx.array], mx.array]


def made_up(spec: str, length: int) -> tuple[CompressedTokens, CompressedTokens]:
    """Handles over random tokens: 4 in the sink, 64 recent, the rest packed."""
    parsed = tq.CacheSpec.parse(spec)
    sides = []
    for side, codec_spec in (("keys", parsed.keys), ("values", parsed.values)):
        codec = codec_for(codec_spec, DIM, side, 0)
        some = codec.encode(mx.random.normal((1, HEADS, _DISTINCT, DIM))).arrays
        times = -(-length // _DISTINCT)
        arrays = {
            name: mx.contiguous(mx.tile(array, (1, 1, times, 1))[:, :, :length])
            for name, array in some.items()
        }
        mx.eval(arrays)
        ends = [
            mx.random.normal((1, HEADS, n, DIM)).astype(mx.float16) for n in (4, 64)
        ]
        gains = mx.exp(mx.random.normal((1, HEADS, 1, DIM)) / 2)
        transform = ChannelTransform(codec.rotation, gains)
        means = None
        if side == "keys":
            means = PageMeans(parsed.page)
            pages = -(-length // parsed.page)
            means.append(mx.random.normal((1, HEADS, pages, DIM)))
            mx.eval(means.state)
        mx.eval(ends, transform.signs_times_gains)
        quantizer = Quantizer(codec, transform, means)
        codes = TokenArrays(arrays, length)
        sides.append(CompressedTokens(quantizer, ends[0], codes, ends[1], 64))
    return sides[0], sides[1]


def median_us(call: Attention) -> float:
    """Microseconds per call when `CALLS` of them are evaluated at once."""
    times = []
    for _ in range(REPEATS + 2):
        queries = [
            mx.random.normal((1, HEADS * GROUP, 1, DIM)).astype(mx.float16)
            for _ in range(CALLS)
        ]
        mx.eval(queries)
        outputs = [call(q) for q in queries]
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(outputs)
        mx.synchronize()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times[2:])


def host_us(call: Attention, count: int = 200) -> float:
    """Microseconds the host needs to build the graph of one call."""
    q = mx.random.normal((1, HEADS * GROUP, 1, DIM)).astype(mx.float16)
    mx.eval(call(q))
    start = time.perf_counter()
    outputs = [call(q) for _ in range(count)]
    elapsed = time.perf_counter() - start
    mx.eval(outputs)
    return elapsed / count * 1e6


def affine(length: int) -> Attention:
    """mlx-lm's 4-bit attention: two quantized products and a softmax."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as attention

    shape = (1, HEADS, length, DIM)
    kv = [
        mx.quantize(mx.random.normal(shape).astype(mx.float16), group_size=64, bits=4)
        for _ in range(2)
    ]
    mx.eval(kv)
    return lambda q: attention(q * 1.0, *kv, 0.09, None, 64, 4)


def fp16(length: int) -> Attention:
    """MLX's own attention on an uncompressed cache."""
    shape = (1, HEADS, length, DIM)
    kv = [mx.random.normal(shape).astype(mx.float16) for _ in range(2)]
    mx.eval(kv)
    return lambda q: mx.fast.scaled_dot_product_attention(q, *kv, scale=0.09)


def packed(backend: Gpu, spec: str, length: int) -> Attention:
    """Our kernels on made-up codes."""
    keys, values = made_up(spec, length)
    return lambda q: backend.attend(AttendCall(q, keys, values, 0.09))


def bytes_read(name: str, length: int) -> float:
    """Bytes of keys and values one call must read."""
    elements = 2 * HEADS * length * DIM
    if name == "fp16":
        return 2 * elements
    if name == "mlx-lm 4":
        return elements * (4 + 32 / 64) / 8
    spec = tq.CacheSpec.parse(name)
    bits = spec.keys.bits + spec.values.bits
    return elements / 2 * (bits + 2 * 16 / DIM) / 8


def copy_bandwidth(size: int = 1 << 30) -> float:
    """GB/s of large copies, reading and writing counted."""
    arrays = [mx.zeros((size // 4,), dtype=mx.float32) for _ in range(8)]
    mx.eval(arrays)
    times = []
    for _ in range(9):
        copies = [array + 1.0 for array in arrays]
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(copies)
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size * len(arrays) / statistics.median(times[2:]) / 1e9


def check(backend: Gpu, spec: str) -> float:
    """Relative error of the kernels against the reference at 3,000 tokens."""
    keys, values = made_up(spec, 3000)
    q = mx.random.normal((1, HEADS * GROUP, 1, DIM)).astype(mx.float16)
    call = AttendCall(q, keys, values, 0.09)
    got = backend.attend(call).astype(mx.float32)
    want = Reference().attend(call._replace(q=q.astype(mx.float32)))
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()


def main() -> None:
    lengths = [int(a) for a in sys.argv[1:]] or [4096, 32768, 131072, 524288]
    dialect = "metal" if mx.metal.is_available() else "cuda"
    backend = Gpu(MlxLauncher(dialect))
    for spec in SPECS:
        print(f"{spec}: error against the reference {check(backend, spec):.1e}")
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.0f} GB/s")
    print("host, per call: ", end="")
    hosts = {
        "fp16": fp16(64),
        "mlx-lm 4": affine(64),
        "k3v3": packed(backend, "k3v3", 64),
    }
    print(", ".join(f"{name} {host_us(call):.0f} us" for name, call in hosts.items()))
    times: dict[int, dict[str, float]] = {}
    for length in lengths:
        calls = {"fp16": fp16, "mlx-lm 4": affine}
        row = {name: median_us(make(length)) for name, make in calls.items()}
        for spec in SPECS:
            row[spec] = median_us(packed(backend, spec, length))
        times[length] = row
        print(f"\n{length:<28}      us    GB/s  of copy  x fp16  x mlx-lm 4")
        for name, us in row.items():
            rate = bytes_read(name, length) / us / 1e3
            print(
                f"{name:28} {us:12.1f} {rate:7.0f} {rate / copy:8.2f} "
                f"{row['fp16'] / us:7.2f} {row['mlx-lm 4'] / us:11.2f}",
                flush=True,
            )
    slopes = {}
    if len(lengths) > 1:
        low, high = lengths[-2:]
        for name in times[high]:
            slopes[name] = (times[high][name] - times[low][name]) / (high - low)
        print("\nkernel, us per 131,072 tokens: ", end="")
        print(", ".join(f"{n} {s * 131072:.1f}" for n, s in slopes.items()))
    device = mx.device_info().get("device_name", str(mx.default_device()))
    report = {"device": device, "mlx": mx.__version__, "copy_gb_s": copy}
    print(json.dumps({**report, "us": times, "us_per_token": slopes}))


if __name__ == "__main__":
    main()

"""Moving tokens in and out of codes: encode a page, decode for prefill.

Llama-3.1-8B's shape (8 KV heads, head_dim 128), keys and values, fp16, on whatever GPU
MLX finds. Kernels beside the same work in plain MLX operations; medians over repeats of
`CALLS` calls in one evaluation. Beside them one decode attention at 32,768 tokens, so
that the cost of a page can be put on the steps that fill it. The last line is JSON.

    python benchmarks/bench_encode.py
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

# A sibling: the script's own folder is on the path.
from bench_attention import LLAMA, dependent_us, packed

import mlx_turboquant as tq
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.codecs import Codec, codec_for
from mlx_turboquant.codecs.base import Side
from mlx_turboquant.kernels.kernel import MlxLauncher
from mlx_turboquant.quantizer import PageMeans, Quantizer
from mlx_turboquant.segments import CompressedTokens
from mlx_turboquant.transform import ChannelTransform

CALLS, REPEATS = 32, 7
PAGE, CHUNK = 128, 2048
SPECS = (
    "k3v3",
    "k4v4",
    "k8v8",
    "k2v2,codec=trellis",
    "k3v3,codec=trellis",
    "k3.5v3.5,codec=trellis",
    "k4v4,codec=trellis",
)
SIDES: tuple[Side, Side] = ("keys", "values")
Tokens = tuple[mx.array, mx.array]


def fresh(count: int) -> Tokens:
    """Keys and values of some tokens."""
    shape = (1, LLAMA.kv_heads, count, LLAMA.dim)
    k, v = (mx.random.normal(shape).astype(mx.float16) for _ in range(2))
    mx.eval(k, v)
    return k, v


def timed(call: Callable[[Tokens], object], count: int) -> float:
    """Microseconds per call on ``count`` tokens."""
    times = []
    for _ in range(REPEATS + 2):
        inputs = [fresh(count) for _ in range(CALLS)]
        outputs = [call(tokens) for tokens in inputs]
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(outputs)
        mx.synchronize()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times[2:])


def costs(backend: Reference, codecs: tuple[Codec, Codec]) -> dict[str, float]:
    """Microseconds of each kind of work, by number of tokens."""
    gains = mx.exp(mx.random.normal((1, LLAMA.kv_heads, 1, LLAMA.dim)) / 2)
    keys, values = (
        Quantizer(codec, ChannelTransform(codec.rotation, gains), side)
        for codec, side in zip(codecs, SIDES, strict=True)
    )
    codes = backend.encode(values, fresh(8192)[1], 0)
    mx.eval(list(codes.arrays.values()))
    side = CompressedTokens(values, None, codes, fresh(1)[0], 1)

    def encode(tokens: Tokens) -> object:
        centred = replace(keys, means=PageMeans(PAGE))
        sides = (
            backend.encode(centred, tokens[0], 0),
            backend.encode(values, tokens[1], 0),
        )
        return [list(codes.arrays.values()) for codes in sides]

    row = {}
    for count in (PAGE, CHUNK):
        row[f"encode {count}"] = timed(encode, count)
    heads = slice(0, LLAMA.kv_heads)
    row["decode 8192"] = timed(lambda _: backend.decode_rot(side, mx.float16, heads), 1)
    return row


def main() -> None:
    dialect = "metal" if mx.metal.is_available() else "cuda"
    backend = Gpu(MlxLauncher(dialect))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for spec in SPECS:
        parsed = tq.CacheSpec.parse(spec)
        codecs = (
            codec_for(parsed.keys, LLAMA.dim, "keys", 0),
            codec_for(parsed.values, LLAMA.dim, "values", 0),
        )
        rows = {"kernel": costs(backend, codecs)}
        # Searches in mx hold the costs of all states at all steps of every call.
        searched = "trellis" in spec
        if not searched:
            rows["mlx"] = costs(Reference(), codecs)
        step = dependent_us(packed(backend, spec, 32768, LLAMA), LLAMA)
        print(f"\n{spec}: us of keys and values    kernel       mlx")
        for name, us in rows["kernel"].items():
            plain = "" if searched else f"{rows['mlx'][name]:9.1f}"
            print(f"{name:30} {us:12.1f} {plain}", flush=True)
        page = rows["kernel"][f"encode {PAGE}"]
        print(
            f"a page is {100 * page / step:.0f}% of an attention step at 32,768 tokens "
            f"({step:.1f} us), {100 * page / step / PAGE:.2f}% of the {PAGE} it lasts"
        )
        results[spec] = {**rows, "step": {"attention at 32768": step}}
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(json.dumps({"device": device, "mlx": mx.__version__, "us": results}))


if __name__ == "__main__":
    main()

"""Decoding speed and memory, end to end: a model, a long prompt, one token at a time.

Rows: the uncompressed cache, mlx-lm's `kv_bits=4`, and ours. Per cache, the prompt is
prefilled once in chunks of 2,048, then rounds of `STEPS` greedy steps alternate between
the caches, so that a busy machine slows them alike; tokens/s is the median round.
Peak memory is MLX's, model included, other rows' caches not. The last line is JSON.

    python benchmarks/bench_generate.py [--model FOLDER | --made-up] [--tokens N ...]

`--made-up` builds a Llama-3.1-8B shape (32 layers, bf16) with random weights. `--fill`
stores random keys and values in place of reading a prompt, which can take minutes.
`--reference-blas` leaves OpenBLAS out, as on a machine that has none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--reference-blas" in sys.argv:
    import mlx.core  # noqa: F401  before the package, which then loads no BLAS

import mlx_turboquant as tq  # before MLX, or its products have the reference BLAS

# isort: split
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

HERE = Path(__file__).parent
BUNDLED = HERE.parent / "examples" / "books-20m"
STEPS, ROUNDS, CHUNK = 16, 5, 2048


#: Llama-3.1-8B's and Llama-3.2-1B's.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
}


def made_up(shape: str = "8b") -> Any:
    """A model of that shape with random weights."""
    args = llama.ModelArgs(
        model_type="llama",
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=32000,
        rope_theta=500000.0,
        **SHAPES[shape],
    )
    model = llama.Model(args)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def caches(
    model: Any, chosen: list[str], max_kv_size: int | None = None
) -> dict[str, Callable[[], list[Any]]]:
    """Name to a maker of an empty prompt cache; names may be specs of ours."""

    def uncompressed() -> list[Any]:
        if max_kv_size is None:
            return make_prompt_cache(model)
        # mlx-lm's own `make_prompt_cache` does not limit models like these.
        return [RotatingKVCache(max_kv_size, keep=4) for _ in model.layers]

    def affine() -> list[Any]:
        plain = make_prompt_cache(model)
        return [QuantizedKVCache(group_size=64, bits=4) for _ in plain]

    makers: dict[str, Callable[[], list[Any]]] = {
        "uncompressed": uncompressed,
        "mlx-lm kv_bits=4": affine,
    }
    specs = [name for name in chosen if name not in makers]
    for spec in specs or ("k3v3", "k4v4", "k8v8", "k3v3,codec=trellis"):
        makers[spec] = lambda spec=spec: tq.make_prompt_cache(model, spec, max_kv_size)
    return {name: makers[name] for name in chosen or makers}


def fill(model: Any, cache: list[Any], length: int) -> float:
    """Seconds to store random keys and values."""
    args = model.args
    heads = args.num_key_value_heads
    dim = args.head_dim or args.hidden_size // args.num_attention_heads
    dtype = model.layers[0].self_attn.k_proj.weight.dtype
    start = time.perf_counter()
    for layer in cache:
        for at in range(0, length, CHUNK):
            shape = (1, heads, min(CHUNK, length - at), dim)
            k, v = (mx.random.normal(shape).astype(dtype) for _ in range(2))
            layer.update_and_fetch(k, v)
            mx.eval(layer.state)
    return time.perf_counter() - start


def prefill(model: Any, cache: list[Any], prompt: mx.array) -> float:
    """Seconds to read the prompt."""
    start = time.perf_counter()
    for at in range(0, prompt.shape[1], CHUNK):
        logits = model(prompt[:, at : at + CHUNK], cache=cache)
        mx.eval(logits[:, -1], [c.state for c in cache])
    return time.perf_counter() - start


def decode(model: Any, cache: list[Any], steps: int, batch: int = 1) -> float:
    """Steps per second, greedy, one in flight as in mlx-lm."""
    token = mx.ones((batch, 1), mx.int32)
    start = time.perf_counter()
    for _ in range(steps):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.async_eval(token)
    mx.eval(token)
    return steps / (time.perf_counter() - start)


def measure(
    model: Any, length: int, chosen: list[str], filling: bool
) -> dict[str, dict[str, float]]:
    """Per cache: prefill seconds, tokens/s, cache bytes, peak bytes."""
    prompt = mx.random.randint(5, 1000, (1, length))
    rows: dict[str, dict[str, float]] = {}
    filled = {}
    for name, make in caches(model, chosen).items():
        mx.clear_cache()
        mx.reset_peak_memory()
        cache = make()
        try:
            if mx.default_device().type == mx.DeviceType.gpu:
                prefill(model, make(), prompt[:, : 2 * CHUNK])  # compiles kernels
            if filling:
                seconds = fill(model, cache, length)
            else:
                seconds = prefill(model, cache, prompt)
            decode(model, cache, 2)
        except RuntimeError as problem:  # MLX has no kernel for it here
            print(f"{name} at {length} tokens failed: {problem}", flush=True)
            continue
        held = sum(row["cache_mb"] for row in rows.values())
        rows[name] = {
            "prefill_s": seconds,
            "cache_mb": sum(c.nbytes for c in cache) / 1e6,
            "peak_mb": mx.get_peak_memory() / 1e6 - held,
        }
        filled[name] = cache
    rates: dict[str, list[float]] = {name: [] for name in filled}
    for _ in range(ROUNDS):
        for name, cache in filled.items():
            rates[name].append(decode(model, cache, STEPS))
    for name, values in rates.items():
        rows[name]["tokens_per_s"] = statistics.median(values)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUNDLED))
    parser.add_argument("--made-up", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--caches", nargs="+", default=[], help="only these rows")
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--reference-blas", action="store_true")
    options = parser.parse_args()
    model = made_up() if options.made_up else tq.load(options.model)[0]
    results = {}
    for length in options.tokens:
        rows = results[length] = measure(model, length, options.caches, options.fill)
        base = next(iter(rows.values()))["tokens_per_s"]
        print(f"\n{length} tokens     tokens/s  x plain  prefill s  cache MB  peak MB")
        for name, row in rows.items():
            print(
                f"{name:18} {row['tokens_per_s']:8.2f} "
                f"{row['tokens_per_s'] / base:8.2f} {row['prefill_s']:10.2f} "
                f"{row['cache_mb']:9.1f} {row['peak_mb']:8.0f}",
                flush=True,
            )
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(json.dumps({"device": device, "mlx": mx.__version__, "rows": results}))


if __name__ == "__main__":
    main()

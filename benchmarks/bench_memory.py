"""A memory ledger: peaks of prompts and of decoding above the weights, and their time.

Models have random weights, bf16: Llama-3.1-8B's and 3.2-1B's shapes, Gemma-3-1B's (most
layers slide), LFM2-1.2B's (most layers have no keys and values). Every row is measured
alone: MLX's cache is empty before it, and nothing else but the weights is in memory.
Where MLX lacks what a cache needs, its error takes the row's place.

    seconds     of the prompt, in chunks of 2,048; the fastest of `--repeats`, behind a
                first one that compiles kernels and chooses plans. Caches take turns
    prompt      MLX's peak while it reads the prompt, weights taken off
    decoding    the same over `STEPS` steps behind it
    cache       bytes of the caches behind the prompt
    law         what it should be at most: caches, two decoded slices, and what two
                layers compute of a chunk. Ours only
    held        chats: bytes in use and in MLX's cache of free ones, less the caches'
                and the weights, after the fifth turn and after the last

    python benchmarks/bench_memory.py [--shape 8b|1b|gemma3|lfm2] [--tokens N ...]
        [--batch N] [--max-kv-size N] [--turns N] [--caches NAME ...] [--repeats N]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from bench_generate import CHUNK, caches, decode, made_up  # first: see there

# isort: split
import mlx.core as mx
from mlx_lm.models import gemma3_text, lfm2

import mlx_turboquant as tq
from mlx_turboquant.integrations.footprint import of_network

STEPS = 64
NAMES = ("uncompressed", "mlx-lm kv_bits=4", "k3v3")


def model_of(shape: str) -> Any:
    """A model with random weights."""
    if shape in ("8b", "1b"):
        return made_up(shape)
    if shape == "gemma3":
        model: Any = gemma3_text.Model(gemma3_text.ModelArgs("gemma3_text"))
    else:
        attending = (2, 5, 8, 10, 12, 14)
        kinds = ["full_attention" if i in attending else "conv" for i in range(16)]
        model = lfm2.Model(
            lfm2.ModelArgs(
                model_type="lfm2",
                vocab_size=65536,
                hidden_size=2048,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                max_position_embeddings=128000,
                norm_eps=1e-5,
                conv_bias=False,
                conv_L_cache=3,
                block_dim=2048,
                block_multiple_of=256,
                block_ffn_dim_multiplier=1.0,
                block_auto_adjust_ff_dim=True,
                block_ff_dim=12288,
                layer_types=kinds,
            )
        )
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def read(model: Any, cache: list[Any], prompt: mx.array) -> float:
    """Seconds to read a prompt as mlx-lm does: no logits, free buffers let go."""
    start = time.perf_counter()
    for at in range(0, prompt.shape[1], CHUNK):
        model(prompt[:, at : at + CHUNK], cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
    return time.perf_counter() - start


def peak_above(weights: int, run: Callable[[], Any]) -> int:
    """Peak bytes of a run above the weights."""
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - weights


def measured(
    model: Any, make: Callable[[], list[Any]], prompt: mx.array, weights: int
) -> dict[str, Any]:
    """One row, but for seconds."""
    cache = make()
    row = {"prompt_mb": peak_above(weights, lambda: read(model, cache, prompt))}
    batch = prompt.shape[0]
    row["cache_mb"] = sum(layer.nbytes for layer in cache)
    row["decoding_mb"] = peak_above(weights, lambda: decode(model, cache, STEPS, batch))
    return {name: count / 1e6 for name, count in row.items()}


def law_mb(model: Any, name: str, prompt: mx.array) -> float:
    """What ours should need while it reads a prompt: `Footprint.prompt_bytes`."""
    batch, tokens = prompt.shape
    spec = tq.CacheSpec.parse(name)
    return batch * of_network(model).prompt_bytes(tokens, spec) / 1e6


def chat(
    model: Any, make: Callable[[], list[Any]], turns: int, weights: int
) -> list[float]:
    """MB held besides weights and caches, after every turn."""
    mx.clear_cache()
    cache, held = make(), []
    for turn in range(turns):
        read(model, cache, mx.random.randint(5, 1000, (1, 150 + 37 * (turn % 7))))
        decode(model, cache, STEPS)
        mx.eval([layer.state for layer in cache])
        used = mx.get_active_memory() + mx.get_cache_memory() - weights
        held.append((used - sum(layer.nbytes for layer in cache)) / 1e6)
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("8b", "1b", "gemma3", "lfm2"), default="8b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--max-kv-size", type=int)
    parser.add_argument("--turns", type=int, default=0, help="of a chat, instead")
    parser.add_argument("--caches", nargs="+", default=NAMES)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    mx.random.seed(0)
    model = model_of(options.shape)
    weights = mx.get_active_memory()
    makers = caches(model, options.caches, options.max_kv_size)
    report: dict[str, Any] = {}
    if options.turns:
        for name, make in makers.items():
            held = chat(model, make, options.turns, weights)
            report[name] = {"held_mb": held}
            print(
                f"{name:20} MB held after 5 turns {held[4]:7.1f}, "
                f"after {options.turns} {held[-1]:7.1f}, most {max(held):7.1f}"
            )
    for tokens in [] if options.turns else options.tokens:
        prompt = mx.random.randint(5, 1000, (options.batch, tokens))
        rows = {}
        for name, make in makers.items():
            try:
                rows[name] = measured(model, make, prompt, weights)
            except RuntimeError as error:
                print(f"{name}: {error}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(options.repeats):
            for name, times in seconds.items():
                times.append(read(model, makers[name](), prompt))
        print(f"\n{options.batch} x {tokens:6}     seconds  x plain  prompt MB  x plain"
              "  decoding MB  cache MB    law MB")  # fmt: skip
        base = rows[next(iter(rows))]
        for name, row in rows.items():
            row["prompt_s"] = min(seconds[name])
            ours = name not in NAMES[:2]
            row["law_mb"] = law_mb(model, name, prompt) if ours else 0.0
            print(
                f"{name:20} {row['prompt_s']:8.4f} "
                f"{row['prompt_s'] / base['prompt_s']:8.3f} {row['prompt_mb']:10.0f} "
                f"{row['prompt_mb'] / base['prompt_mb']:8.3f} "
                f"{row['decoding_mb']:12.0f} {row['cache_mb']:9.1f} "
                f"{row['law_mb']:9.0f}",
                flush=True,
            )
        report[str(tokens)] = rows
    device = mx.device_info().get("device_name", str(mx.default_device()))
    print(json.dumps({"device": device, "mlx": mx.__version__, "rows": report}))


if __name__ == "__main__":
    main()

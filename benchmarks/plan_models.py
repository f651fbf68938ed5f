"""How many tokens fit beside two models of Llama's, and what their caches take.

    python benchmarks/plan_models.py > benchmarks/results/plan.txt

What `mlx_tq.plan --model M --memory GB` says, from configs that have the published
shapes, weights at 4 bits in groups of 64. Arithmetic: nothing is measured.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_turboquant as tq

#: Of a Mac's memory, what macOS gives a GPU at first.
SHARE = 0.7
GB = 10**9
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "quantization": {"bits": 4, "group_size": 64},
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
SPECS = {"uncompressed": None} | {
    f"{bits} bits": tq.CacheSpec.parse(bits) for bits in (4, 3, 2)
}
MEMORY, LENGTH = (8, 16, 32), 32_768


def lines() -> Iterator[str]:
    """The table, line by line."""
    yield "Tokens that fit, no more than a model's context, by what memory there is,"
    yield f"of which {SHARE:.0%} counts. Then the GB that a cache takes."
    yield ""
    yield f"{'model':14}{'memory':>8}" + "".join(f"{name:>14}" for name in SPECS)
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.json"
            config.write_text(json.dumps(_LLAMA | shape))
            found = tq.footprint(folder, mx.bfloat16)
        for memory in MEMORY:
            room = round(SHARE * memory * GB)
            fits = (found.tokens_in(room, spec) for spec in SPECS.values())
            cells = "".join(f"{tokens:>14,}" for tokens in fits)
            yield f"{name:14}{memory:>5} GB{cells}"
        sizes = (found.cache_bytes(LENGTH, spec) / GB for spec in SPECS.values())
        cells = "".join(f"{size:>14.2f}" for size in sizes)
        yield f"{name:14}{LENGTH:>8,}{cells}"


if __name__ == "__main__":
    print("\n".join(lines()))

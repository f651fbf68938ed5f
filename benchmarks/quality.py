"""Teacher-forced quality of KV caches on real text: shared by benchmark and tests.

Owns the measurement (`compare`) and the text windows. Every token goes through the
real cache, in chunks or one by one, and its next-token distribution is held against
that of the uncompressed cache for the same weights.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache

import mlx_turboquant as tq

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "books-20m"
BOOKS = ROOT / "tests" / "data" / "books-heldout.txt.xz"
MakeCache = Callable[[nn.Module], list[Any]]


@dataclass(frozen=True)
class Quality:
    """Distance of a cache from the uncompressed one, over all scored tokens."""

    kld: float
    kld_p99: float
    top1: float
    perplexity: float
    bits: float


def windows(tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """``count`` token windows of ``length``, spread over the held-out books."""
    books = lzma.decompress(BOOKS.read_bytes()).decode().split("\n\x0c\n")
    found = []
    for index in range(count):
        book = books[index % len(books)]
        start = 20_000 + 9_000 * (index // len(books))
        ids = tokenizer.encode(book[start : start + 7 * length])
        found.append([0, *ids[: length - 1]])
    assert all(len(window) == length for window in found)
    return found


def log_probs(
    model: nn.Module, tokens: list[int], cache: list[Any], chunk: int, head: int
) -> mx.array:
    """Log-probabilities (T - 1 - head, vocabulary) after tokens head..T-2.

    The first ``head`` tokens are one chunk and are not scored; the others follow in
    steps of ``chunk`` tokens.
    """
    ids = mx.array(tokens[:-1])[None]
    if head:
        model(ids[:, :head], cache=cache)
        mx.eval([layer.state for layer in cache])
    rows = []
    for start in range(head, ids.shape[1], chunk):
        logits = model(ids[:, start : start + chunk], cache=cache)[0]
        logits = logits.astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logits, [layer.state for layer in cache])
        rows.append(logits)
    return mx.concatenate(rows)


def compare(
    model: nn.Module,
    texts: list[list[int]],
    references: list[mx.array],
    make: MakeCache,
    chunk: int,
    head: int = 0,
) -> Quality:
    """Score a kind of cache against ``references`` from `log_probs`."""
    klds, hits, losses, stored, elements = [], [], [], 0, 0
    for tokens, base in zip(texts, references, strict=True):
        cache = make(model)
        got = log_probs(model, tokens, cache, chunk, head)
        klds.append(np.array(mx.sum(mx.exp(base) * (base - got), axis=-1)))
        hits.append(np.array(mx.argmax(base, -1) == mx.argmax(got, -1)))
        truth = mx.array(tokens[head + 1 :])[:, None]
        losses.append(-np.array(mx.take_along_axis(got, truth, axis=-1)))
        stored += stored_bits(cache)
        elements += sum(_elements(layer) for layer in cache)
    kld = np.concatenate(klds)
    return Quality(
        kld=float(kld.mean()),
        kld_p99=float(np.quantile(kld, 0.99)),
        top1=float(np.concatenate(hits).mean()),
        perplexity=math.exp(float(np.concatenate(losses).mean())),
        bits=stored / elements,
    )


def stored_bits(cache: list[Any]) -> int:
    """Bits a cache stores for its tokens: codes, scales, means, windows.

    Spare capacity is not counted on either side; tokens that stay in the model's
    dtype are counted as 16 bits, also where the CPU runs the model in float32.
    """
    total = 0
    for layer in cache:
        if isinstance(layer, tq.TurboQuantCache):
            for key, array in layer.state.items():
                if key != "header":
                    plain = array.dtype == mx.float32
                    total += array.size * 16 if plain else 8 * array.nbytes
        elif isinstance(layer, QuantizedKVCache):
            for array in (*layer.keys, *layer.values):
                used = array[:, :, : layer.offset]
                plain = array.dtype == mx.float32
                total += used.size * 16 if plain else 8 * used.nbytes
        else:
            total += 16 * _elements(layer)
    return total


def _elements(layer: Any) -> int:
    if isinstance(layer, tq.TurboQuantCache):
        return layer.elements
    if isinstance(layer, QuantizedKVCache):
        width = layer.group_size * (layer.keys[1].shape[3] + layer.values[1].shape[3])
        return layer.offset * layer.keys[0].shape[1] * width
    width = layer.keys.shape[3] + layer.values.shape[3]
    return int(layer.offset * layer.keys.shape[1] * width)


def stock(model: nn.Module) -> list[Any]:
    """mlx-lm's uncompressed cache."""
    return [KVCache() for _ in model.layers]


def affine(bits: int) -> MakeCache:
    """mlx-lm's own ``--kv-bits``: groups of 64, two scales in the model's dtype."""
    return lambda model: [QuantizedKVCache(64, bits) for _ in model.layers]


def ours(spec: str) -> MakeCache:
    """A compressed cache of this package."""
    return lambda model: tq.make_prompt_cache(model, spec)

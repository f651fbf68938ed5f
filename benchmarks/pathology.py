"""Transforms that leave a Llama's output alone and make its cache hard to compress.

Owns one context manager, `injected`. Each transform is exact in real arithmetic: keys
shifted by a constant after RoPE (softmax cannot see it), gains on RoPE pairs of keys
undone on queries, the attention scale moved into the queries, gains on value channels
undone in the output projection. What a cache loses under one is the codec's doing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

#: Ratio of the offset's norm to the root mean square norm of the keys around it.
OFFSETS = (1.0, 3.0, 10.0, 30.0)
GAINS = (4.0, 16.0)
NAMES = (
    *(f"offset {rho:g}" for rho in OFFSETS),
    *(f"pair gains {gain:g}" for gain in GAINS),
    "scale 1",
    "value tails",
)


class _OffsetRope(nn.Module):
    """RoPE, and a constant added to keys: told from queries by their heads."""

    def __init__(self, inner: Any, heads: int, offset: mx.array) -> None:
        super().__init__()
        self._inner, self._heads, self._offset = inner, heads, offset

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        rotated = self._inner(x, offset=offset)
        return rotated + self._offset if x.shape[1] == self._heads else rotated


@contextlib.contextmanager
def injected(model: Any, name: str, seed: int = 0) -> Iterator[None]:
    """``model`` (mlx-lm's Llama, float weights) with one of `NAMES` inside."""
    rng = np.random.default_rng(seed)
    kind, _, amount = name.rpartition(" ")
    undo: list[Callable[[], None]] = []
    for layer in model.model.layers:
        attention = layer.self_attn
        undo.append(_saved(attention))
        if kind == "offset":
            _offset(attention, float(amount), rng)
        elif kind == "pair gains":
            _pair_gains(attention, float(amount), rng)
        elif name == "scale 1":
            attention.q_proj.weight = attention.q_proj.weight * attention.scale
            attention.scale = 1.0
        elif name == "value tails":
            _value_gains(attention, rng)
        else:
            raise ValueError(f"pathology {name!r} is unknown; choose from {NAMES}")
    mx.eval(model.parameters())
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def _saved(attention: Any) -> Callable[[], None]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {name: getattr(attention, name).weight for name in names}
    rope, scale = attention.rope, attention.scale

    def put_back() -> None:
        for name, weight in weights.items():
            getattr(attention, name).weight = weight
        attention.rope, attention.scale = rope, scale

    return put_back


def _offset(attention: Any, rho: float, rng: np.random.Generator) -> None:
    heads = attention.n_kv_heads
    dim = attention.k_proj.weight.shape[0] // heads
    # Inputs are RMS-normalised, so a row's norm is about the spread of its channel.
    weight = attention.k_proj.weight.reshape(heads, -1)
    spread = mx.sqrt(mx.sum(weight * weight, axis=-1))
    direction = mx.array(rng.normal(size=(heads, dim)).astype(np.float32))
    direction = direction / mx.linalg.norm(direction, axis=-1, keepdims=True)
    offset = (rho * spread[:, None] * direction)[None, :, None]
    attention.rope = _OffsetRope(attention.rope, heads, offset)


def _pair_gains(attention: Any, largest: float, rng: np.random.Generator) -> None:
    heads = attention.n_kv_heads
    dim = attention.k_proj.weight.shape[0] // heads
    # Element d and d + dim / 2 turn together; a gain of both commutes with RoPE.
    half = largest ** rng.uniform(-1, 1, size=(heads, dim // 2))
    gain = np.concatenate([half, half], axis=1).astype(np.float32)
    group = attention.n_heads // heads
    keys, queries = mx.array(gain), mx.array(np.repeat(1 / gain, group, axis=0))
    attention.k_proj.weight = attention.k_proj.weight * keys.reshape(-1, 1)
    attention.q_proj.weight = attention.q_proj.weight * queries.reshape(-1, 1)


def _value_gains(attention: Any, rng: np.random.Generator) -> None:
    heads = attention.n_kv_heads
    dim = attention.v_proj.weight.shape[0] // heads
    gain = np.abs(rng.standard_t(2, size=(heads, dim))).clip(0.1).astype(np.float32)
    group = attention.n_heads // heads
    back = mx.array(np.repeat(1 / gain, group, axis=0)).reshape(1, -1)
    attention.v_proj.weight = attention.v_proj.weight * mx.array(gain).reshape(-1, 1)
    attention.o_proj.weight = attention.o_proj.weight * back

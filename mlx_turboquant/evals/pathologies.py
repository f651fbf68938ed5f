"""Transforms that leave a Llama's output alone and make its cache hard to compress.

`injected` puts one of them into a model. Each transform but the biases is exact in real
arithmetic, so what a cache loses under one is the codec's doing:

    offset R       keys shifted by a constant after RoPE, R times their own size, which
                   softmax cannot see
    bias R         a k_proj bias of that size on the slowest RoPE pairs, as in Qwen2.5;
                   RoPE turns it a little, so the model changes, if hardly
    low sink       keys shifted so that the first token's is nearly zero
    pair gains A   RoPE pairs of the keys times 1/A to A, undone on the queries
    scale 1        the attention scale moved into the queries, as in Gemma
    value tails    heavy-tailed gains on value channels, undone in the output projection
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import SpecError, UnsupportedModelError
from ..integrations.stock import stock_caches

#: Ratio of an offset's norm to the root mean square norm of the keys around it.
OFFSETS = (1.0, 3.0, 10.0, 30.0)
GAINS = (4.0, 16.0)
NAMES = (
    *(f"offset {rho:g}" for rho in OFFSETS),
    "bias 3",
    "bias 10",
    "low sink",
    *(f"pair gains {gain:g}" for gain in GAINS),
    "scale 1",
    "value tails",
)
_LEFT_OF_SINK = 0.05  # share of the first key's norm that "low sink" leaves
_SLOW_PAIRS = 4


class _OffsetRope(nn.Module):  # type: ignore[misc]
    """RoPE, and a constant added to keys, which differ from queries in their heads."""

    def __init__(self, inner: Any, heads: int, offset: mx.array) -> None:
        super().__init__()
        self._inner, self._heads, self._offset = inner, heads, offset

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        rotated: mx.array = self._inner(x, offset=offset)
        return rotated + self._offset if x.shape[1] == self._heads else rotated


@contextlib.contextmanager
def injected(model: Any, name: str, seed: int = 0) -> Iterator[None]:
    """``model`` (mlx-lm's Llama, float weights) with one of `NAMES` inside.

    Raises:
        SpecError: for a name that is not in `NAMES`.
        UnsupportedModelError: for another kind of model.
    """
    if name not in NAMES:
        raise SpecError(f"pathology {name!r} is unknown; choose from {NAMES}")
    rng = np.random.default_rng(seed)
    kind, _, amount = name.rpartition(" ")
    undo: list[Callable[[], None]] = []
    layers = _layers(model)
    for layer, first_key in zip(layers, _first_keys(model), strict=True):
        attention = layer.self_attn
        undo.append(_saved(attention))
        if kind == "offset":
            _random_offset(attention, float(amount), rng)
        elif kind == "bias":
            _bias(attention, float(amount), rng)
        elif name == "low sink":
            _offset(attention, (_LEFT_OF_SINK - 1) * first_key)
        elif kind == "pair gains":
            _pair_gains(attention, float(amount), rng)
        elif name == "scale 1":
            attention.q_proj.weight = attention.q_proj.weight * attention.scale
            attention.scale = 1.0
        else:
            _value_gains(attention, rng)
    mx.eval(model.parameters())
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def _layers(model: Any) -> list[Any]:
    layers = getattr(getattr(model, "model", None), "layers", [])
    plain = all(
        type(getattr(layer.self_attn, name, None)) is nn.Linear
        for layer in layers
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    grouped = all(la.self_attn.n_heads > la.self_attn.n_kv_heads for la in layers)
    if not layers or not plain or not grouped:
        raise UnsupportedModelError(
            "pathologies need a Llama with float weights and grouped queries",
            "leave them out",
        )
    return list(layers)


def _first_keys(model: Any) -> list[mx.array]:
    """Keys (1, H, 1, D) of token 0 at position 0, layer by layer."""
    cache = stock_caches(model)
    model(mx.array([[0]]), cache=cache)
    return [layer.keys[:, :, :1] for layer in cache]


def _saved(attention: Any) -> Callable[[], None]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {name: getattr(attention, name).weight for name in names}
    rope, scale = attention.rope, attention.scale

    def put_back() -> None:
        for name, weight in weights.items():
            getattr(attention, name).weight = weight
        attention.rope, attention.scale = rope, scale
        attention.k_proj.pop("bias", None)

    return put_back


def _offset(attention: Any, offset: mx.array) -> None:
    attention.rope = _OffsetRope(attention.rope, attention.n_kv_heads, offset)


def _spread(attention: Any) -> mx.array:
    """About the root mean square norm of each head's keys: (H,)."""
    # Inputs are RMS-normalised, so a row's norm is about the spread of its channel.
    weight = attention.k_proj.weight.reshape(attention.n_kv_heads, -1)
    spread: mx.array = mx.sqrt(mx.sum(weight * weight, axis=-1))
    return spread


def _random_offset(attention: Any, rho: float, rng: np.random.Generator) -> None:
    heads = attention.n_kv_heads
    dim = attention.k_proj.weight.shape[0] // heads
    direction = mx.array(rng.normal(size=(heads, dim)).astype(np.float32))
    direction = direction / mx.linalg.norm(direction, axis=-1, keepdims=True)
    offset = rho * _spread(attention)[:, None] * direction
    _offset(attention, offset[None, :, None])


def _bias(attention: Any, rho: float, rng: np.random.Generator) -> None:
    heads = attention.n_kv_heads
    dim = attention.k_proj.weight.shape[0] // heads
    bias = np.zeros((heads, 2, dim // 2), dtype=np.float32)
    bias[:, :, -_SLOW_PAIRS:] = rng.normal(size=(heads, 2, _SLOW_PAIRS))
    flat = bias.reshape(heads, dim)
    direction = mx.array(flat / np.linalg.norm(flat, axis=-1, keepdims=True))
    attention.k_proj.bias = (rho * _spread(attention)[:, None] * direction).reshape(-1)


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

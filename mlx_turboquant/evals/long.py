"""Long generation: what a cache does to a text that the model itself goes on writing.

A prompt with facts in it is followed by thousands of the model's own tokens, so that
whatever a lossy cache does to one step is in the keys and values of all later ones.
Two things are asked of a cache: the same text is read by it, a decode step at a time,
and compared token by token with the uncompressed cache; then it writes a text itself,
by the same random numbers, to see where the texts part and whether it repeats itself.
Structured output of the same cache is `calls`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import needles
from .caches import CacheFactory, stored_bits

PROMPT = 512  # tokens before the model's own
FACTS = 6  # hidden in them
TEMPERATURE = 0.7
#: Tokens read at a time: the most that caches take as a decode step.
STEP = 16
_GRAM = 4


@dataclass(frozen=True)
class OwnText:
    """A prompt, and what the model wrote behind it through an uncompressed cache.

    Attributes:
        prompt: Tokens of the prompt.
        written: Tokens behind them.
    """

    prompt: list[int]
    written: list[int]


def write(
    model: nn.Module,
    prompt: list[int],
    factory: CacheFactory,
    count: int,
    prefill: int,
    seed: int,
) -> list[int]:
    """``count`` tokens sampled behind a prompt through a fresh cache.

    Token i is drawn by random numbers that depend on the seed and i only: two caches
    write the same text until they differ about a token.

    Args:
        model: The model.
        prompt: Tokens to begin with.
        factory: Makes the cache.
        count: Tokens to write.
        prefill: Tokens of the prompt read at a time.
        seed: Of the random numbers.
    """
    cache = factory()
    needles.read(model, prompt[:-1], cache, prefill)
    step, out = mx.array(prompt[-1:])[None], []
    for index in range(count):
        logits = model(step, cache=cache)[:, -1].astype(mx.float32)
        key = mx.random.key((seed << 32) + index)
        token = mx.random.categorical(logits / TEMPERATURE, key=key)
        out.append(cast(int, token.item()))
        step = token[None]
    return out


def divergence(
    model: nn.Module,
    text: OwnText,
    factory: CacheFactory,
    plain: CacheFactory,
    prefill: int,
    step: int = STEP,
) -> tuple[dict[str, Any], list[Any]]:
    """How a cache reads a text that was written through an uncompressed one.

    Both caches are read side by side, so no scores are kept.

    Args:
        model: The model.
        text: What to read.
        factory: Makes the cache to score.
        plain: Makes the uncompressed one.
        prefill: Tokens of the prompt read at a time.
        step: Tokens of the written text that the scored cache reads at a time; it
            divides `STEP`.

    Returns:
        ``kld`` (nats) of each written token's distribution, ``same``, how many of them
        have the same most likely token, ``bits`` and ``elements`` as `scoring.score`;
        and the cache, behind the text.
    """
    scored, exact = factory(), plain()
    for cache in (scored, exact):
        needles.read(model, text.prompt[:-1], cache, prefill)
    ids = mx.array([text.prompt[-1], *text.written[:-1]])[None]
    klds, same = [], 0
    for at in range(0, ids.shape[1], STEP):
        stop = min(at + STEP, ids.shape[1])
        truth = _logprobs(model, ids[:, at:stop], exact)
        rows = mx.concatenate(
            [
                _logprobs(model, ids[:, begin : min(begin + step, stop)], scored)
                for begin in range(at, stop, step)
            ]
        )
        klds.append(np.array(mx.sum(mx.exp(truth) * (truth - rows), axis=-1)))
        agree = mx.argmax(truth, axis=-1) == mx.argmax(rows, axis=-1)
        same += cast(int, mx.sum(agree).item())
    bits, elements = stored_bits(scored)
    return {
        "kld": [float(f"{x:.4g}") for x in np.concatenate(klds)],
        "same": same,
        "bits": round(bits),
        "elements": elements,
    }, scored


def repetition(tokens: list[int]) -> float:
    """Share of the runs of four tokens that stood in the text before; 0 for none."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _logprobs(model: nn.Module, step: mx.array, cache: list[Any]) -> mx.array:
    """Log-probabilities (tokens, vocabulary) float32 behind each token of a step."""
    logits = model(step, cache=cache)[0].astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logits, [layer.state for layer in cache])
    return cast(mx.array, logits)

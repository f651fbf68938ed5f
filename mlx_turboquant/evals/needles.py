"""Retrieval and divergence: does a cache still find facts, when does its text part.

Owns the made-up facts (their wording is one the bundled model was trained to answer),
where they are hidden, and the greedy continuation.
"""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .caches import MakeCache

_COLOURS = ("silver", "golden", "ancient", "crooked", "hidden", "frozen", "hollow")
_THINGS = ("lantern", "bridge", "mirror", "clock", "harbor", "statue", "anchor")
_ANSWER_TOKENS = 10


def haystack(
    tokenizer: Any, tokens: list[int], depths: int, seed: int = 0
) -> tuple[list[int], list[tuple[float, str, str]]]:
    """``tokens`` with facts in them, and (depth, question, answer) of each.

    The facts stand evenly from near the front to near the back and are counted in the
    length, which stays that of ``tokens``.
    """
    rng = random.Random(seed)
    pairs = [(c, t) for c in _COLOURS for t in _THINGS]
    facts, questions = [], []
    for index, (colour, thing) in enumerate(rng.sample(pairs, depths)):
        code = "".join(rng.choice("123456789") for _ in range(5))
        depth = (index + 0.5) / depths
        name = f"the {colour} {thing}"
        facts.append(_ids(tokenizer, f" The secret code of {name} is {code}."))
        question = f"\n\nQuestion: What is the secret code of {name}?\nAnswer:"
        questions.append((depth, question, code))
    body = tokens[: len(tokens) - sum(map(len, facts))]
    out: list[int] = []
    done = 0
    for fact, (depth, _, _) in zip(facts, questions, strict=True):
        at = int(depth * len(body))
        out += body[done:at] + fact
        done = at
    return out + body[done:], questions


def retrieve(
    model: nn.Module,
    tokenizer: Any,
    tokens: list[int],
    make: MakeCache,
    depths: int,
    prefill: int,
) -> list[dict[str, Any]]:
    """Ask for every fact in a text that is read once; the cache is trimmed between."""
    text, questions = haystack(tokenizer, tokens, depths)
    cache = make()
    ids = mx.array(text)[None]
    for at in range(0, len(text), prefill):
        model(ids[:, at : at + prefill], cache=cache)
        mx.eval([layer.state for layer in cache])
    found = []
    for depth, question, code in questions:
        asked = _ids(tokenizer, question)
        answer = continuation(model, asked, cache, _ANSWER_TOKENS)
        for layer in cache:
            layer.trim(len(asked) + _ANSWER_TOKENS - 1)
        said = tokenizer.decode(answer)
        found.append(
            {
                "length": len(tokens),
                "depth": depth,
                "found": code in said.replace(" ", ""),
                "said": said.strip()[:40],
                "wanted": code,
            }
        )
    return found


def continuation(
    model: nn.Module, tokens: list[int], cache: list[Any], count: int
) -> list[int]:
    """The ``count`` most likely next tokens, one after the other."""
    out: list[int] = []
    step = mx.array(tokens)[None]
    for _ in range(count):
        token = mx.argmax(model(step, cache=cache)[:, -1], axis=-1)
        out.append(int(np.array(token)[0]))
        step = token[None]
    return out


def greedy(
    model: nn.Module, tokens: list[int], make: MakeCache, count: int, prefill: int
) -> list[int]:
    """What is written greedily after ``tokens``, through a fresh cache."""
    cache = make()
    ids = mx.array(tokens[:-1])[None]
    for at in range(0, ids.shape[1], prefill):
        model(ids[:, at : at + prefill], cache=cache)
        mx.eval([layer.state for layer in cache])
    return continuation(model, tokens[-1:], cache, count)


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many first tokens are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))

"""Retrieval and divergence: does a cache still find facts, when does its text part.

The facts are made up, in a wording that the bundled model was trained to answer.
"""

from __future__ import annotations

import copy
import random
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..integrations.stock import labelled_leaves
from .caches import CacheFactory

_COLOURS = ("silver", "golden", "ancient", "crooked", "hidden", "frozen", "hollow")
_THINGS = ("lantern", "bridge", "mirror", "clock", "harbor", "statue", "anchor")
_ANSWER_TOKENS = 10


def haystack(
    tokenizer: Any,
    tokens: list[int],
    depths: int,
    seed: int = 0,
    is_distinct: bool = False,
) -> tuple[list[int], list[tuple[float, str, str]]]:
    """``tokens`` with facts in them, and (depth, question, answer) of each.

    The facts stand evenly from near the front to near the back and are counted in the
    length, which stays that of ``tokens``. If they are distinct (seven at most), no two
    of them share an adjective or a noun.
    """
    rng = random.Random(seed)
    pairs = [(c, t) for c in _COLOURS for t in _THINGS]
    if is_distinct:
        chosen = list(
            zip(rng.sample(_COLOURS, depths), rng.sample(_THINGS, depths), strict=True)
        )
    else:
        chosen = rng.sample(pairs, depths)
    facts, questions = [], []
    for index, (colour, thing) in enumerate(chosen):
        code = "".join(rng.choice("123456789") for _ in range(5))
        depth = (index + 0.5) / depths
        name = f"the {colour} {thing}"
        facts.append(ids_of(tokenizer, f" The secret code of {name} is {code}."))
        question = f"\n\nQuestion: What is the secret code of {name}?\nAnswer:"
        questions.append((depth, question, code))
    body = tokens[: len(tokens) - sum(map(len, facts))]
    out: list[int] = []
    start = 0
    for fact, (depth, _, _) in zip(facts, questions, strict=True):
        stop = int(depth * len(body))
        out += body[start:stop] + fact
        start = stop
    return out + body[start:], questions


def retrieve(
    model: nn.Module,
    tokenizer: Any,
    tokens: list[int],
    factory: CacheFactory,
    depths: int,
    prefill: int,
) -> list[dict[str, Any]]:
    """Ask for every fact in a text that is read once.

    The cache is trimmed between, or copied where it forgets tokens or has states.
    """
    text_ids, questions = haystack(tokenizer, tokens, depths)
    cache = factory()
    read(model, text_ids, cache, prefill)
    answers = []
    leaves = [leaf for _, leaf in labelled_leaves(cache)]
    is_whole = all(x.is_trimmable() and not hasattr(x, "max_size") for x in leaves)
    for depth, question, code in questions:
        question_ids = ids_of(tokenizer, question)
        asked = cache if is_whole else copy.deepcopy(cache)
        answer_ids = continuation(model, question_ids, asked, _ANSWER_TOKENS)
        if is_whole:
            for layer in cache:
                layer.trim(len(question_ids) + _ANSWER_TOKENS - 1)
        answer = tokenizer.decode(answer_ids)
        answers.append(
            {
                "length": len(tokens),
                "depth": depth,
                "found": code in answer.replace(" ", ""),
                "said": answer.strip()[:40],
                "wanted": code,
            }
        )
    return answers


def continuation(
    model: nn.Module, tokens: list[int], cache: list[Any], count: int
) -> list[int]:
    """The ``count`` most likely next tokens, one after the other.

    All of ``tokens`` are one step, and the last answer stays out of the cache: mlx-lm's
    `generate_step` does both otherwise, so scores of older runs would not compare.
    """
    out: list[int] = []
    step = mx.array(tokens)[None]
    for _ in range(count):
        token = mx.argmax(model(step, cache=cache)[:, -1], axis=-1)
        out.append(cast(int, token.item()))
        step = token[None]
    return out


def greedy(
    model: nn.Module,
    tokens: list[int],
    factory: CacheFactory,
    count: int,
    prefill: int,
) -> list[int]:
    """What is written greedily after ``tokens``, through a fresh cache."""
    cache = factory()
    read(model, tokens[:-1], cache, prefill)
    return continuation(model, tokens[-1:], cache, count)


def common_prefix(one: list[int], other: list[int]) -> int:
    """How many first tokens are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def read(model: nn.Module, tokens: list[int], cache: list[Any], prefill: int) -> None:
    """Read a text into a cache, ``prefill`` tokens at a time."""
    ids = mx.array(tokens)[None]
    for start in range(0, len(tokens), prefill):
        model(ids[:, start : start + prefill], cache=cache)
        mx.eval([layer.state for layer in cache])


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on another one."""
    return list(tokenizer.encode(text, add_special_tokens=False))

"""Structured output: arguments of calls, copied from far back in a text.

As a decoder under a JSON grammar does it: the skeleton of a call is given, the model
fills in its arguments. A name is one of those that the grammar lists (the likeliest),
a number is digits. What a call is about is asked as `needles` asks for facts.
"""

from __future__ import annotations

import json
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .needles import ids_of

_DIGITS = "0123456789"


def make_calls(
    model: nn.Module,
    tokenizer: Any,
    cache: list[Any],
    questions: list[tuple[float, str, str]],
) -> list[dict[str, Any]]:
    """One call for each fact that a cache has read; the cache is trimmed between.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        cache: A prompt cache behind the text with the facts.
        questions: As `needles.haystack` gives them.

    Returns:
        Of each call the JSON text ``said`` and ``wanted``, and which of its arguments
        ``name`` and ``code`` are right.
    """
    names = [_split_name(question) for _, question, _ in questions]
    nouns = [noun for _, _, noun in names]
    digits = {_only(tokenizer, digit): digit for digit in _DIGITS}
    calls = []
    for (lead, adjective, noun), (_, _, code) in zip(names, questions, strict=True):
        before = ids_of(tokenizer, f"{lead}{adjective}")
        choices = [ids_of(tokenizer, f" {word}") for word in nouns]
        chosen = _likeliest(model, cache, before, choices)
        named = nouns[chosen]
        ask = ids_of(tokenizer, f"{lead}{adjective} {noun}?\nAnswer: ")
        number = _number(model, cache, ask, digits, len(code))
        said = {"name": f"{adjective} {named}", "code": int(number)}
        wanted = {"name": f"{adjective} {noun}", "code": int(code)}
        calls.append(
            {
                "said": json.dumps(said),
                "wanted": json.dumps(wanted),
                "name": said["name"] == wanted["name"],
                "code": said["code"] == wanted["code"],
            }
        )
    return calls


def _split_name(question: str) -> tuple[str, str, str]:
    """(what stands before the name, its adjective, its noun) of a question."""
    lead, _, rest = question.partition("the secret code of the ")
    adjective, noun = rest.partition("?")[0].split()
    return f"{lead}the secret code of the ", adjective, noun


def _only(tokenizer: Any, digit: str) -> int:
    """The token that writes a digit behind another one."""
    return ids_of(tokenizer, f"1{digit}")[-1]


def _likeliest(
    model: nn.Module, cache: list[Any], before: list[int], choices: list[list[int]]
) -> int:
    """Which of some continuations has the largest probability a token."""
    first = model(mx.array(before)[None], cache=cache)[:, -1:]
    scores = []
    for choice in choices:
        logits = first[0]
        if len(choice) > 1:
            step = mx.array(choice[:-1])[None]
            logits = mx.concatenate([first, model(step, cache=cache)], axis=1)[0]
            for layer in cache:
                layer.trim(len(choice) - 1)
        rows = logits.astype(mx.float32)
        rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        picked = mx.take_along_axis(rows, mx.array(choice)[:, None], axis=-1)
        scores.append(cast(float, mx.mean(picked).item()))
    for layer in cache:
        layer.trim(len(before))
    return max(range(len(scores)), key=scores.__getitem__)


def _number(
    model: nn.Module,
    cache: list[Any],
    before: list[int],
    digits: dict[int, str],
    count: int,
) -> str:
    """``count`` digits, each the likeliest one."""
    allowed, text, step = mx.array(list(digits)), "", mx.array(before)[None]
    for _ in range(count):
        logits = model(step, cache=cache)[0, -1]
        token = allowed[mx.argmax(logits[allowed])]
        text += digits[cast(int, token.item())]
        step = token[None, None]
    for layer in cache:
        layer.trim(len(before) + count - 1)
    return text

"""Where a request's prompt is gone back to: the ends of its parts, in tokens.

Models with recurrent states or windows can only be gone on with where these were kept
(``conversations/snapshots.py``). The parts are a chat template's, so it is asked.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from ..conversations import stops
from ..conversations.index import as_tokens, common_length

#: What templates raise for messages that they were not written for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
)
Message = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a prompt end, in tokens.

    Attributes:
        ends: Of tools, system prompt, and the last two messages; unsorted.
        beginning: Of the system prompt and the tools, whichever is later.
    """

    ends: tuple[int, ...] = ()
    beginning: int = 0


def parts_of(
    render: Callable[[list[Message]], list[int]],
    messages: Sequence[Message],
    prompt: Sequence[int],
) -> Parts:
    """Where the parts of a chat end.

    Ends of messages before the last two were kept when they were the last. A template
    that cannot render a part of a chat leaves that end out.

    Args:
        render: A chat template's tokens of messages, without what begins an answer.
        messages: The chat.
        prompt: Its tokens, with what begins an answer.
    """
    system = 0
    while system < len(messages) and messages[system].get("role") == "system":
        system += 1
    whole, nothing = as_tokens(prompt), {"role": "user", "content": ""}

    def end_of(part: list[Message]) -> int:
        try:
            return common_length(whole, as_tokens(render(part)))
        except _TEMPLATE_ERRORS as error:
            logging.debug(f"The chat template cannot render a part: {error}")
            return 0

    # Templates put tools in front of the system prompt, or behind it.
    tools = end_of([{"role": "system", "content": ""}, nothing])
    beginning = max(tools, end_of([*messages[:system], nothing]))
    last = [end_of(list(messages[:n])) for n in (len(messages) - 1, len(messages)) if n]
    return Parts((tools, beginning, *last), beginning)


def parts_of_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    prompt: Sequence[int],
    options: Mapping[str, Any],
) -> Parts:
    """As `parts_of`, by the tokenizer's chat template; none without one.

    Args:
        tokenizer: Of mlx-lm's wrapper class.
        messages: The chat.
        prompt: Its tokens, with what begins an answer.
        options: Of the template, tools among them.
    """
    if not tokenizer.has_chat_template:
        return Parts()
    fixed = {"tokenize": True, "add_generation_prompt": False}
    render = functools.partial(tokenizer.apply_chat_template, **{**options, **fixed})
    return parts_of(render, messages, prompt)


def cut_at_places(
    prompt: Sequence[int], parts: Parts, others: Iterable[int] = ()
) -> tuple[list[list[int]], list[str]]:
    """A prompt in segments, behind each of which its states should be kept.

    Args:
        prompt: Its tokens.
        parts: Where its parts end.
        others: Other places to keep them at.

    Returns:
        The segments, and their kinds: ``"system"`` for the beginning, or up to the last
        of the others if there is none; else ``"user"``.
    """
    ends = [*parts.ends, *others]
    places = [0, *stops(len(prompt), ends, parts.beginning), len(prompt)]
    segments = [list(prompt[start:stop]) for start, stop in itertools.pairwise(places)]
    beginning = parts.beginning or max(others, default=0)
    kinds = ["system" if place <= beginning else "user" for place in places[1:]]
    return segments, kinds

"""A chat as its template writes it: whole, open at the end, or from one turn on.

Owns the words for what a template cannot do. Templates are programs of a model's
authors: anything may come out of them, and what they are given may not be in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SpecError

Messages = Sequence[Mapping[str, str]]
#: Stand in for a message's text, to see what a template writes around it.
_PLACEHOLDERS = ("A", "B")


def use_default(tokenizer: Any) -> None:
    """Give a tokenizer that has no chat template its class's.

    transformers 5 has no class with one: there this does nothing or is refused, where
    mlx-lm's generate goes on without a template and its server ends in an error.

    Args:
        tokenizer: Of mlx-lm's wrapper class.

    Raises:
        SpecError: if the class has none either.
    """
    if tokenizer.has_chat_template:
        return
    template = getattr(tokenizer, "default_chat_template", None)
    if template is None:
        raise SpecError(
            "neither this tokenizer nor its class has a chat template; leave "
            "--use-default-chat-template out"
        )
    tokenizer.chat_template = template
    tokenizer.has_chat_template = True


def render(
    tokenizer: Any, messages: Messages, options: Mapping[str, Any], answers: bool = True
) -> str:
    """The text of a chat.

    Args:
        tokenizer: Of mlx-lm's wrapper class, with a chat template.
        messages: Roles and contents, in the order of the chat.
        options: Of the template.
        answers: Whether an answer is to follow.

    Raises:
        SpecError: if the template fails, or what it makes is no text.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), **{"add_generation_prompt": answers, **options},
            tokenize=False,
        )  # fmt: skip
    except Exception as error:  # whatever a template does
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise SpecError(
            f"the chat template cannot write a chat of {roles} ({first}); leave out "
            "what it does not know, such as --system-prompt, or --ignore-chat-template"
        ) from error
    if not isinstance(text, str):
        raise SpecError(
            f"the chat template makes {type(text).__name__}, no text; use "
            "--ignore-chat-template"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"the chat template makes what no UTF-8 has ({text[error.start]!a}); use "
            "--ignore-chat-template"
        ) from None
    return text


def render_open(tokenizer: Any, messages: Messages, options: Mapping[str, Any]) -> str:
    """The text of a chat whose last message goes on: nothing closes it.

    Raises:
        SpecError: as `render`, or if the template leaves that message out.
    """
    text = render(tokenizer, messages, options, answers=False)
    closing = _around(tokenizer, messages, len(messages) - 1, options, False)[1]
    return text[: len(text) - len(closing)] if text.endswith(closing) else text


def render_from(
    tokenizer: Any, messages: Messages, turn: int, options: Mapping[str, Any],
    is_open: bool = False,
) -> str:  # fmt: skip
    """The text of a chat from the content of message ``turn`` on.

    Whatever opens that turn was read before, with another text in its place.

    Args:
        tokenizer: As for `render`.
        messages: As for `render`.
        turn: Index of the first message whose content is wanted.
        options: As for `render`.
        is_open: The last message goes on.

    Raises:
        SpecError: as `render`, or if the template leaves that message out.
    """
    if is_open:
        text = render_open(tokenizer, messages, options)
    else:
        text = render(tokenizer, messages, options)
    opening = _around(tokenizer, messages, turn, options, not is_open)[0]
    return text.removeprefix(opening)


def _around(
    tokenizer: Any, messages: Messages, turn: int, options: Mapping[str, Any],
    answers: bool,
) -> tuple[str, str]:  # fmt: skip
    """What a template writes before and after the content of a message.

    Found with two other contents, as templates strip and rewrite what they are given.
    """
    texts = []
    for content in _PLACEHOLDERS:
        message = {**messages[turn], "content": content}
        chat = [*messages[:turn], message, *messages[turn + 1 :]]
        texts.append(render(tokenizer, chat, options, answers))
    if texts[0] == texts[1]:
        raise SpecError(
            f"the chat template leaves out what the {messages[turn].get('role')} says; "
            "use --ignore-chat-template"
        )
    before = _common(texts)
    after = _common([text[len(before) :][::-1] for text in texts])
    return before, after[::-1]


def _common(texts: Sequence[str]) -> str:
    """What two texts begin with."""
    pairs = enumerate(zip(*texts, strict=False))
    length = next((i for i, (a, b) in pairs if a != b), min(map(len, texts)))
    return texts[0][:length]

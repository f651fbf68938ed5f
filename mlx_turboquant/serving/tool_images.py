"""Images in what tools gave back: a model that sees gets them, another one a note.

Chat templates have a place for images in what the user says; not all of those that see
have one in a tool's result. Owns where such images go; fetching is ``images.py``'s.
"""

from __future__ import annotations

import logging
from typing import Any

OMITTED = "[image omitted]"
_BELOW = "[image below]"
_TOOLS = ("tool", "function")
Message = dict[str, Any]


def omit(messages: list[Message]) -> None:
    """Put a note where a tool's result has an image, in place."""
    for message in messages:
        if _has_images(message):
            message["content"] = _text(message["content"], OMITTED)


def place(messages: list[Message], tokenizer: Any, processor: Any) -> None:
    """Put images of tools' results where the chat template takes them, in place.

    They stay where they are if it can render them there; else the user shows them
    behind the results.

    Args:
        messages: The chat, as OpenAI writes it.
        tokenizer: Has the template.
        processor: Of the model's images.
    """
    if not any(map(_has_images, messages)) or _takes_them(tokenizer, processor):
        return
    said: list[Message] = []
    shown: list[Any] = []
    for message in messages:
        if shown and message.get("role") not in _TOOLS:
            said.append({"role": "user", "content": shown})
            shown = []
        if _has_images(message):
            content = message["content"]
            shown += [part for part in content if part.get("type") != "text"]
            message["content"] = _text(content, _BELOW)
        said.append(message)
    if shown:
        said.append({"role": "user", "content": shown})
    messages[:] = said


def _has_images(message: Message) -> bool:
    content = message.get("content")
    return (
        message.get("role") in _TOOLS
        and isinstance(content, list)
        and any(part.get("type") != "text" for part in content)
    )


def _text(content: list[Any], note: str) -> str:
    return "\n".join(
        (part.get("text") or "") if part.get("type") == "text" else note
        for part in content
    )


def _takes_them(tokenizer: Any, processor: Any) -> bool:
    """Whether the template writes an image's token within a tool's result."""
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    talk = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "."},
        {"role": "tool", "content": [image]},
    ]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception as error:
        logging.debug(f"The chat template takes no images of tools: {error}")
        return False
    return str(processor.image_token) in text

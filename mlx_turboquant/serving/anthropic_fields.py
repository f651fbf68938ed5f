"""The fields of Anthropic's requests, and the chat that they stand for.

Chat templates know OpenAI's messages and tools, so a request is said in those words:
texts, images, thinking, uses of tools and their results.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import RequestError
from .fields import Count, Fields, Name, Probability, Word

#: Begins a note of some clients to Anthropic's billing. It is no text for a model, and
#: changes from request to request, so that nothing behind it would be read from memory.
_BILLING = "x-anthropic-billing-header:"


class Source(Fields):
    """Where an image or a document is."""

    type: Literal["base64", "url", "text", "content", "file"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class ResultPart(Fields):
    """A part of what a tool gave back."""

    type: Literal["text", "image", "document", "tool_reference"]
    text: str | None = None
    source: Source | None = None
    tool_name: Name | None = None


class Block(Fields):
    """A part of a message."""

    type: Literal[
        "text",
        "image",
        "document",
        "thinking",
        "redacted_thinking",
        "tool_use",
        "tool_result",
    ]
    text: str | None = None
    source: Source | None = None
    thinking: str | None = None
    id: Name | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: (
        str | Annotated[list[ResultPart], Field(max_length=4096, fail_fast=True)] | None
    ) = None
    is_error: bool | None = None


class SystemPart(Fields):
    """A part of the system prompt."""

    type: Literal["text"]
    text: str


class AnthropicMessage(Fields):
    """A message of either side."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=4096, fail_fast=True)]


class AnthropicTool(Fields):
    """A tool that the model may use; those that Anthropic runs itself are refused."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Fields):
    """Whether tools may be used; that they must cannot be forced."""

    type: Literal["auto", "none"]


class Thinking(Fields):
    """Whether the model should think first, where its template lets one choose."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None


class OutputConfig(Fields):
    """The answer's form; what a grammar would have to force is refused."""

    format: None = None


class CountFields(Fields):
    """``/v1/messages/count_tokens``."""

    model: Name | None = None
    messages: Annotated[
        list[AnthropicMessage], Field(min_length=1, max_length=16384, fail_fast=True)
    ]
    system: (
        str | Annotated[list[SystemPart], Field(max_length=4096, fail_fast=True)] | None
    ) = None
    tools: (
        Annotated[list[AnthropicTool], Field(max_length=4096, fail_fast=True)] | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    def chat(self) -> list[dict[str, Any]]:
        """The messages, as OpenAI writes them."""
        if self.messages[-1].role == "assistant":
            raise RequestError(
                "the last message is the assistant's, and answers cannot be begun here",
                "end with a message of the user's",
                param="messages",
            )
        said: list[dict[str, Any]] = []
        system = self.system or []
        texts = [system] if isinstance(system, str) else [part.text for part in system]
        texts = [text for text in map(_without_billing, texts) if text]
        if texts:
            said.append({"role": "system", "content": "\n\n".join(texts)})
        for index, message in enumerate(self.messages):
            said += _as_chat(message, index)
        return said

    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools, as OpenAI writes them."""
        if not self.tools or (self.tool_choice and self.tool_choice.type == "none"):
            return None
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in self.tools
        ]

    def template_variables(self) -> dict[str, Any] | None:
        """What the template is told beside messages and tools."""
        if self.thinking is None:
            return None
        return {"enable_thinking": self.thinking.type != "disabled"}


class MessagesFields(CountFields):
    """``/v1/messages``."""

    max_tokens: Count
    stream: bool | None = None
    temperature: Probability | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: (
        Annotated[list[Word], Field(max_length=64, fail_fast=True)] | None
    ) = None
    output_config: OutputConfig | None = None


def _as_chat(message: AnthropicMessage, index: int) -> list[dict[str, Any]]:
    """One message of ours; results of tools are messages of their own there."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for place, block in enumerate(message.content):
        where = f"messages.{index}.content.{place}"
        if block.type == "text":
            parts.append({"type": "text", "text": _given(block.text, where, "text")})
        elif block.type == "image":
            parts.append(_image(_given(block.source, where, "source"), where))
        elif block.type == "document":
            parts.append({"type": "text", "text": _document(block.source)})
        elif block.type == "thinking":
            thoughts.append(_given(block.thinking, where, "thinking"))
        elif block.type == "tool_use":
            name = _given(block.name, where, "name")
            arguments = json.dumps(block.input or {}, ensure_ascii=False)
            calls.append(
                {
                    "id": _given(block.id, where, "id"),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            )
        elif block.type == "tool_result":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": _given(block.tool_use_id, where, "tool_use_id"),
                    "content": _result(block, where),
                }
            )
    if not parts and not calls and not thoughts:
        return results or [{"role": message.role, "content": ""}]
    text_only = all(part["type"] == "text" for part in parts)
    content = "\n".join(part["text"] for part in parts) if text_only else parts
    said: dict[str, Any] = {"role": message.role, "content": content}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    if calls:
        said["tool_calls"] = calls
    return [*results, said]


def _given(value: Any, where: str, member: str) -> Any:
    if value is None:
        raise RequestError(
            f"{where} has no {member}", "add it", param=f"{where}.{member}"
        )
    return value


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def _document(source: Source | None) -> str:
    """A document's text; a note for one that has none, such as a PDF."""
    is_text = source is not None and source.type == "text"
    return (source.data or "") if source and is_text else "[document omitted]"


def _image(source: Source, where: str) -> dict[str, Any]:
    if source.type == "url":
        url = _given(source.url, where, "source.url")
    elif source.type != "base64":
        raise RequestError(
            f"{where} has an image by {source.type}, which is not taken",
            "send base64 or url",
            param=f"{where}.source.type",
        )
    else:
        data = _given(source.data, where, "source.data")
        url = f"data:{source.media_type or 'image/png'};base64,{data}"
    return {"type": "image_url", "image_url": {"url": url}}


def _result(block: Block, where: str) -> str | list[dict[str, Any]]:
    """What a tool gave back: a text, or parts if there are images among them."""
    error = "Error: " if block.is_error else ""
    if block.content is None or isinstance(block.content, str):
        return error + (block.content or "")
    parts: list[dict[str, Any]] = [{"type": "text", "text": error}] if error else []
    for place, part in enumerate(block.content):
        within = f"{where}.content.{place}"
        if part.type == "image":
            parts.append(_image(_given(part.source, within, "source"), within))
            continue
        text = part.text or ""
        if part.type == "document":
            text = _document(part.source)
        elif part.type == "tool_reference":
            text = f"[tool {part.tool_name or ''}]"
        parts.append({"type": "text", "text": text})
    if all(part["type"] == "text" for part in parts):
        texts = [part["text"] for part in parts[bool(error) :]]
        return error + "\n".join(texts)
    return parts

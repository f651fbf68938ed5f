"""The fields of OpenAI's requests: which there are, of what type, and how large.

Everything is checked here, before a request is handed to the thread that generates;
what depends on a loaded model (its vocabulary, its context) is checked there, by
``integrations/supervision.py``. Names and defaults are mlx-lm's, limits that mlx-lm has
not are OpenAI's. Fields that are not listed are ignored, as mlx-lm ignores them; fields
that would change the answer, and that we cannot serve, are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError

#: What mlx-lm calls the model that the server was started with.
DEFAULT_MODEL = "default_model"
_INT32 = 2**31 - 1
_MOST_BIASES = 4096
_TEMPLATE_ARGUMENTS = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
)


def _without_template_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Template variables, none of which is an argument of the tokenizer's method.

    Those choose the template, or its output's form and length.
    """
    taken = sorted(_TEMPLATE_ARGUMENTS.intersection(given))
    if taken:
        raise ValueError(f"{taken[0]!r} is the server's to set")
    return given


def _whole_numbers(given: Any) -> Any:
    """JSON's names of members as the numbers they spell."""
    if not isinstance(given, dict):
        return given
    if len(given) > _MOST_BIASES:  # before each is looked at
        raise ValueError(f"at most {_MOST_BIASES} tokens, here are {len(given)}")
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise ValueError("token ids are whole numbers, as '42'") from None


Count = Annotated[int, Field(ge=1, le=_INT32)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-100, le=100)]
Window = Annotated[int, Field(ge=0, le=1 << 20)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Word = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[int, Field(ge=0, le=_INT32)]
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_whole_numbers),
]
TemplateVariables = Annotated[
    dict[str, Any], AfterValidator(_without_template_arguments)
]
Only1 = Annotated[int, Field(ge=1, le=1)]


class Fields(BaseModel):
    """An object of a request: of exactly these types, other members ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Open(Fields):
    """An object whose other members are the chat template's business."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Fields):
    """What a stream says beside the text."""

    include_usage: bool | None = None


class SamplingFields(Fields):
    """What both of OpenAI's requests have; None is the server's default."""

    model: Name | None = None
    draft_model: Name | None = None
    adapters: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    min_p: Probability | None = None
    num_draft_tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=100)] | None = None
    repetition_context_size: Window | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: Window | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: Window | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    logit_bias: LogitBias | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=20)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Word | Annotated[list[Word], Field(max_length=64, fail_fast=True)] | None = (
        None
    )
    n: Only1 | None = None

    def stop_words(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class FunctionCall(Open):
    """A call of a tool, as an assistant made it."""

    name: Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(Open):
    """The same with its id."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ImageUrl(Open):
    """Where an image is."""

    url: str


class Part(Open):
    """A part of a message's content: text, or an image."""

    type: Literal["text", "image_url", "input_image", "image"]
    text: str | None = None
    image_url: str | ImageUrl | None = None
    image: str | ImageUrl | None = None


class Message(Open):
    """A message of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: (
        str | Annotated[list[Part], Field(max_length=4096, fail_fast=True)] | None
    ) = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: (
        Annotated[list[ToolCall], Field(max_length=1024, fail_fast=True)] | None
    ) = None


class Function(Open):
    """A tool that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Open):
    """The same, as OpenAI wraps it."""

    type: Literal["function"]
    function: Function


class ResponseFormat(Fields):
    """The answer's form; what a grammar would have to force is refused."""

    type: Literal["text"]


class ChatFields(SamplingFields):
    """``/v1/chat/completions``."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=16384, fail_fast=True)
    ]
    tools: Annotated[list[Tool], Field(max_length=4096, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    role_mapping: dict[str, str] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None


class CompletionFields(SamplingFields):
    """``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, max_length=1, fail_fast=True)]
    )
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Only1 | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


F = TypeVar("F", bound=Fields)


def parse(kind: type[F], body: bytes) -> F:
    """A request's fields, read from its body.

    Raises:
        RequestError: with status 400, if it is not JSON or a value is not possible.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ")
        raise RequestError(
            f"the body is not JSON in UTF-8 ({reason})", "send one JSON object"
        )
    # Where a member may be of several types, each of them has an error of its own.
    paths = [[str(s) for s in one["loc"] if _is_member(s)] for one in errors]
    about = [i for i, path in enumerate(paths) if path[:1] == paths[0][:1]]
    path = list(_common_start([paths[i] for i in about]))
    param = ".".join(path) or None
    if first["type"] == "missing":
        raise RequestError(f"the request has no {param}", "add it", param=param)
    closest = min(about, key=lambda i: len(paths[i]))
    shown = repr(errors[closest]["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    messages = dict.fromkeys(_in_a_sentence(errors[i]["msg"]) for i in about)
    raise RequestError(
        f"{param or 'the request'} is {shown}: {', or '.join(list(messages)[:3])}",
        "see docs/serving.md for what it may be",
        param=param,
    )


def _common_start(paths: list[list[str]]) -> Iterator[str]:
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            return
        yield steps[0]


def _in_a_sentence(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _is_member(step: int | str) -> bool:
    """Whether a step of pydantic's path is in the request, not in our types."""
    return isinstance(step, int) or not (step in _UNIONS or "[" in step)


#: What pydantic calls the choices of a union.
_UNIONS = {"str", "bool", "int", "dict", "ImageUrl"}

"""OpenAI's form of answers: chat and text completions, whole or in chunks, errors.

mlx-lm's fields beside OpenAI's stay: ``reasoning``, and token ids among the logprobs.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_lm.server import Response

from ..errors import RequestError
from .answer import Answer, Piece, Usage, logprob

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def error_body(error: RequestError) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": str(error),
            "type": _KINDS.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def event(value: Any) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(value)}\n\n".encode()


@dataclass
class OpenAIForm:
    """How one answer is written.

    Attributes:
        kind: Which of the two requests it answers.
        model: The model's name, as the request says it.
        fingerprint: Which versions and machine answer.
        with_logprobs: Whether tokens are listed with their log probabilities.
        with_usage: Whether a stream ends with what it took.
    """

    kind: Literal["chat", "text"]
    model: str
    fingerprint: str
    with_logprobs: bool = False
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4()}"
        self._is_first = True

    def _envelope(self, of: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": of,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }

    def _choice(self, piece: Piece, **content: Any) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": piece.finish, **content}
        if self.with_logprobs:
            choice["logprobs"] = self._logprobs(piece.tokens)
        return choice

    def _logprobs(self, tokens: list[Response]) -> dict[str, Any]:
        listed = [
            _one_logprob(
                token.token,
                token.text,
                token.logprob,
                [
                    _one_logprob(top["id"], top["token"], top["logprob"])
                    for top in token.top_tokens
                ],
            )
            for token in tokens
        ]
        if self.kind == "chat":
            return {"content": listed}
        return {
            "content": listed,
            "tokens": [one["token"] for one in listed],
            "token_logprobs": [one["logprob"] for one in listed],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in one["top_logprobs"]}
                for one in listed
            ],
        }

    def start(self, answer: Answer) -> list[bytes]:
        """What a stream begins with."""
        return []

    def alive(self, read: tuple[int, int]) -> bytes:
        """What a stream says while the prompt is read; clients ignore it."""
        return f": keepalive {read[0]}/{read[1]}\n\n".encode()

    def chunk(self, piece: Piece, answer: Answer) -> list[bytes]:
        """The events for a part of the answer."""
        more = {"usage": None} if self.with_usage else {}
        if self.kind == "text":
            choice = self._choice(piece, text=piece.text)
            return [event(self._envelope("text_completion", [choice], **more))]
        delta: dict[str, Any] = {"role": "assistant"} if self._is_first else {}
        self._is_first = False
        if piece.text:
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning"] = piece.reasoning
        if piece.calls:
            delta["tool_calls"] = piece.calls
        choice = self._choice(piece, delta=delta)
        return [event(self._envelope("chat.completion.chunk", [choice], **more))]

    def end(self, answer: Answer) -> list[bytes]:
        """What a stream ends with."""
        done = [b"data: [DONE]\n\n"]
        if not self.with_usage:
            return done
        of = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        usage = self._envelope(of, [], usage=answer.usage.as_openai())
        return [event(usage), *done]

    def failed(self, error: RequestError) -> bytes:
        """What a stream ends with that met a fault."""
        return event(error_body(error))

    def whole(self, piece: Piece, usage: Usage) -> dict[str, Any]:
        """An answer that is not streamed, ``piece`` being all of it."""
        took = usage.as_openai()
        if self.kind == "text":
            choice = self._choice(piece, text=piece.text)
            return self._envelope("text_completion", [choice], usage=took)
        message: dict[str, Any] = {"role": "assistant", "content": piece.text or None}
        if piece.reasoning:
            message["reasoning"] = piece.reasoning
        if piece.calls:
            message["tool_calls"] = [
                {name: v for name, v in call.items() if name != "index"}
                for call in piece.calls
            ]
        choice = self._choice(piece, message=message)
        return self._envelope("chat.completion", [choice], usage=took)


def _one_logprob(
    token: int, text: str, value: float, top: list[Any] | None = None
) -> dict[str, Any]:
    # mlx-lm names tokens as the vocabulary does, and has no name for some ids.
    text = text or ""
    one = {"id": token, "token": text, "logprob": logprob(value)}
    one["bytes"] = list(text.encode())
    if top is not None:
        one["top_logprobs"] = top
    return one

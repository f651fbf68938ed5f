"""Anthropic's form of answers: messages of blocks, whole or as events, and errors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from ..errors import RequestError
from .answer import Answer, Piece, Usage

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOPS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


def error_body(error: RequestError) -> dict[str, Any]:
    """An error as Anthropic's clients expect it."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def event(value: dict[str, Any]) -> bytes:
    """One event of a stream; its name is its type."""
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n".encode()


def usage_of(usage: Usage) -> dict[str, int]:
    """What a request took; its input is what was not reused."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.generated,
    }


class AnthropicForm:
    """How one answer is written.

    Args:
        model: The model's name, as the request says it.
        ends_turn: Tokens that end a turn; what else stops a text is a stop sequence.
        stop_sequences: Those of the request.
    """

    def __init__(
        self, model: str, ends_turn: Sequence[int], stop_sequences: Sequence[str]
    ) -> None:
        self._model, self._ends_turn = model, ends_turn
        self._stop_sequences = stop_sequences
        self.id = f"msg_{uuid.uuid4().hex}"
        self._index = -1
        self._open: str | None = None

    def _message(self, usage: Usage, content: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            **more,
            "usage": usage_of(usage),
        }

    def _stop(self, finish: str | None, tokens: Sequence[int]) -> dict[str, Any]:
        reason, sequence = _STOPS[finish or "stop"], None
        if reason == "end_turn" and tokens and tokens[-1] not in self._ends_turn:
            reason = "stop_sequence"
            # Of several, mlx-lm does not say which.
            if len(self._stop_sequences) == 1:
                sequence = self._stop_sequences[0]
        return {"stop_reason": reason, "stop_sequence": sequence}

    def start(self, answer: Answer) -> list[bytes]:
        """What a stream begins with."""
        message = self._message(answer.usage, [])
        return [event({"type": "message_start", "message": message})]

    def alive(self, read: tuple[int, int]) -> bytes:
        """What a stream says while the prompt is read."""
        return event({"type": "ping"})

    def chunk(self, piece: Piece, answer: Answer) -> list[bytes]:
        """The events for a part of the answer."""
        events: list[bytes] = []
        if piece.reasoning:
            events += self._block("thinking", {"thinking": "", "signature": ""})
            events += self._delta("thinking_delta", thinking=piece.reasoning)
        if piece.text:
            events += self._block("text", {"text": ""})
            events += self._delta("text_delta", text=piece.text)
        for call in piece.calls:
            block = _tool_use(call)
            given, block["input"] = block["input"], {}
            events += self._close()
            events += self._block("tool_use", block)
            events += self._delta("input_json_delta", partial_json=json.dumps(given))
            events += self._close()
        if piece.finish is not None:
            events += self._close()
            stop = self._stop(piece.finish, answer.tokens)
            usage = usage_of(answer.usage)
            events.append(
                event({"type": "message_delta", "delta": stop, "usage": usage})
            )
        return events

    def _block(self, kind: str, content: dict[str, Any]) -> list[bytes]:
        """Begin a block of a kind, unless one is open."""
        if self._open == kind:
            return []
        closed = self._close()
        self._index, self._open = self._index + 1, kind
        start = {
            "type": "content_block_start",
            "index": self._index,
            "content_block": {"type": kind, **content},
        }
        return [*closed, event(start)]

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [event({"type": "content_block_stop", "index": self._index})]

    def _delta(self, kind: str, **content: str) -> list[bytes]:
        delta = {"type": kind, **content}
        return [
            event({"type": "content_block_delta", "index": self._index, "delta": delta})
        ]

    def end(self, answer: Answer) -> list[bytes]:
        """What a stream ends with."""
        return [event({"type": "message_stop"})]

    def failed(self, error: RequestError) -> bytes:
        """What a stream ends with that met a fault."""
        return event(error_body(error))

    def whole(self, piece: Piece, usage: Usage) -> dict[str, Any]:
        """An answer that is not streamed, ``piece`` being all of it."""
        content: list[dict[str, Any]] = []
        if piece.reasoning:
            content.append(
                {"type": "thinking", "thinking": piece.reasoning, "signature": ""}
            )
        if piece.text:
            content.append({"type": "text", "text": piece.text})
        content += [_tool_use(call) for call in piece.calls]
        tokens = [token.token for token in piece.tokens]
        return self._message(usage, content, **self._stop(piece.finish, tokens))


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    given = json.loads(call["function"]["arguments"])
    if not isinstance(given, dict):  # parsers leave what was no object as it is
        given = {"value": given}
    return {
        "type": "tool_use",
        "id": call["id"],
        "name": call["function"]["name"],
        "input": given,
    }

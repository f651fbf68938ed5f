"""From mlx-lm's tokens to what an answer is made of: text, reasoning, calls of tools.

Owns the order of an answer's parts, whatever form they are sent in. Which text is
reasoning or a call is mlx-lm's to say.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.server import Response, ToolCallFormatter

from ..errors import RequestError
from ..integrations.rows import RowFault
from .relay import Relay

#: What OpenAI gives for a probability of zero.
_LEAST_LOGPROB = -9999.0


@dataclass
class Piece:
    """A part of an answer.

    Attributes:
        text, reasoning: What to add to either.
        calls: Calls of tools that are complete, as OpenAI writes them.
        tokens: What was generated since the last piece.
        finish: ``stop``, ``length`` or ``tool_calls`` with the last piece.
        read: While the prompt is read, how many of its tokens are, of how many.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Response] = field(default_factory=list)
    finish: str | None = None
    read: tuple[int, int] | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of its prompt, of these reused, of its answer."""

    prompt: int
    cached: int
    generated: int

    def as_openai(self) -> dict[str, Any]:
        """The ``usage`` of OpenAI's answers."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Answer:
    """One answer as it comes.

    Args:
        relay: Brings the tokens; its request has been accepted.
        tools: Tools that the request named.

    Attributes:
        tokens: Ids of all tokens so far.
        first_token_after: Seconds until the first came; None before.
    """

    def __init__(self, relay: Relay, tools: list[Any] | None) -> None:
        context = relay.context
        self._relay = relay
        self._state = context.text_sm.make_state(context.initial_state)
        self._last = context.initial_state
        self._call_text = ""
        self._format = ToolCallFormatter(context.tool_parser, tools, streaming=True)
        self.tokens: list[int] = []
        self.first_token_after: float | None = None

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        context = self._relay.context
        cached = max(0, context.prompt_cache_count)
        return Usage(len(context.prompt), cached, len(self.tokens))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its parts, the last of which has a ``finish``.

        Raises:
            RequestError: if the row met a fault, or it takes too long.
            Gone: if the client hangs up.
        """
        finish, called = "stop", False
        waiting = Piece()
        async for response in self._relay.responses():
            if isinstance(response, tuple):
                yield Piece(read=response)
                continue
            if isinstance(response.finish_reason, RowFault):
                raise RequestError(
                    f"the server met a fault with this request "
                    f"({response.finish_reason})",
                    "change its sampling",
                    status=500,
                )
            if self.first_token_after is None:
                self.first_token_after = self._relay.seconds()
            self.tokens.append(response.token)
            waiting.tokens.append(response)
            for state, text in self._segments(response):
                if state == "tool":
                    self._call_text += text
                elif state == "reasoning":
                    waiting.reasoning += text
                elif state == "normal":
                    called |= self._end_call(waiting)
                    waiting.text += text
                self._last = state
            if self._last != "tool" and (
                waiting.text or waiting.reasoning or waiting.calls
            ):
                yield waiting
                waiting = Piece()
            finish = response.finish_reason or finish
        called |= self._end_call(waiting)
        waiting.finish = "tool_calls" if called and finish == "stop" else finish
        yield waiting

    def _segments(self, response: Response) -> list[tuple[str, str]]:
        if response.finish_reason == "stop":
            self._state, state = TextStateMachine.discard(self._state)
            return [(state, "")]
        self._state, segments = TextStateMachine.split(self._state, response.text)
        if response.finish_reason == "length":
            self._state, rest, state = TextStateMachine.flush(self._state)
            segments.append((state, rest))
        return list(segments)

    def _end_call(self, piece: Piece) -> bool:
        """Add the call whose text has come, if one has; whether there was a call."""
        text, self._call_text = self._call_text, ""
        if self._last != "tool" or not text:
            return False
        try:
            calls = self._format([text])
        except Exception as error:
            # mlx-lm expects a few kinds of errors; its parsers raise others as well.
            logging.debug("A call could not be read", exc_info=error)
            calls = []
        calls = [
            call for call in calls if isinstance(call["function"].get("name"), str)
        ]
        piece.calls += calls
        if not calls:
            piece.text += text  # cut short, or no call at all: nothing is lost
        return bool(calls)


def logprob(value: float) -> float:
    """A log probability as JSON can say it."""
    return value if math.isfinite(value) else _LEAST_LOGPROB

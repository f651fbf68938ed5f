"""`Service`: from a request's fields to its answer.

Owns the order: fields are checked, names resolved, images fetched, and only then is the
request handed to the generation thread. Forms are ``openai_form.py``'s and
``anthropic_form.py``'s, who may ask is ``guard.py``'s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from mlx_lm.server import CompletionRequest, GenerationArguments
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import RequestError
from ..integrations.supervision import SupervisedGenerator, TokensCounted
from . import images, tool_images
from .answer import Answer, Piece
from .anthropic_fields import CountFields, MessagesFields
from .anthropic_form import AnthropicForm
from .arguments import arguments_of
from .fields import (
    DEFAULT_MODEL,
    ChatFields,
    CompletionFields,
    SamplingFields,
    parse,
)
from .guard import too_large
from .long_texts import LongTexts
from .metrics import Metrics
from .names import Names
from .openai_form import OpenAIForm
from .relay import Gone, Relay

#: What is answered to nobody: the client hung up.
_HUNG_UP = 499


@dataclass(frozen=True)
class Limits:
    """How much of the server one request may take.

    Attributes:
        max_body: Bytes of its body.
        body_seconds: For its body to come.
        request_seconds: For its whole answer; None for any time.
        max_waiting: Requests that may wait for their turn.
    """

    max_body: int = 64 << 20
    body_seconds: float = 60.0
    request_seconds: float | None = None
    max_waiting: int = 64


class Service:
    """Answers requests.

    Args:
        generator: Generates.
        names: What requests may name.
        options: The command's, for defaults of sampling.
        limits: How much one request may take.
        fingerprint: Which versions and machine answer.
    """

    def __init__(
        self,
        generator: SupervisedGenerator,
        names: Names,
        options: argparse.Namespace,
        limits: Limits,
        fingerprint: str,
    ) -> None:
        self.generator, self.names = generator, names
        self._options, self._limits = options, limits
        self._fingerprint = fingerprint
        self.metrics = Metrics()
        self._long_texts = LongTexts(generator)

    async def chat(self, http: Request) -> Response:
        """``/v1/chat/completions``."""
        fields = parse(ChatFields, await self._body(http))
        tools = None
        if fields.tools and fields.tool_choice != "none":
            tools = [tool.model_dump(exclude_unset=True) for tool in fields.tools]
        messages = [one.model_dump(exclude_unset=True) for one in fields.messages]
        model = self.names.resolve(fields.model, fields.adapters, fields.draft_model)
        await self._fetch_images(messages)
        asked = CompletionRequest("chat", "", messages, tools, fields.role_mapping)
        arguments = arguments_of(fields, model, self._options, fields.logprobs)
        arguments.chat_template_kwargs = fields.chat_template_kwargs
        form = self._openai_form("chat", fields, arguments)
        return await self._answer(http, asked, arguments, form, fields.stream)

    async def completion(self, http: Request) -> Response:
        """``/v1/completions``."""
        fields = parse(CompletionFields, await self._body(http))
        model = self.names.resolve(fields.model, fields.adapters, fields.draft_model)
        prompt: Any = fields.prompt
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            prompt = prompt[0]
        asked = CompletionRequest("text", prompt, [], None, None)
        arguments = arguments_of(fields, model, self._options, fields.logprobs)
        form = self._openai_form("text", fields, arguments)
        return await self._answer(http, asked, arguments, form, fields.stream)

    async def message(self, http: Request) -> Response:
        """``/v1/messages``."""
        fields = parse(MessagesFields, await self._body(http))
        asked, arguments = await self._as_chat(fields)
        tokenizer = self.generator.model_provider.tokenizer
        form = AnthropicForm(
            fields.model or DEFAULT_MODEL,
            [] if tokenizer is None else list(tokenizer.eos_token_ids),
            fields.stop_sequences or [],
        )
        return await self._answer(http, asked, arguments, form, fields.stream)

    async def count_tokens(self, http: Request) -> Response:
        """``/v1/messages/count_tokens``."""
        fields = parse(CountFields, await self._body(http))
        asked, arguments = await self._as_chat(fields)
        arguments.max_tokens = 0  # asks for their number only
        self._check_waiting()
        relay = Relay(self._limits.request_seconds)
        try:
            await self._long_texts.prepare(http.state.size, asked, arguments)
            async with relay.asked(self.generator, asked, arguments, http):
                raise AssertionError("nothing is generated for a count")
        except TokensCounted as counted:
            return JSONResponse({"input_tokens": counted.count})
        except Gone:
            return Response(status_code=_HUNG_UP)

    async def _as_chat(
        self, fields: CountFields
    ) -> tuple[CompletionRequest, GenerationArguments]:
        messages = fields.chat()
        model = self.names.resolve(fields.model)
        await self._fetch_images(messages)
        asked = CompletionRequest("chat", "", messages, fields.chat_tools(), None)
        sampling = SamplingFields()
        if isinstance(fields, MessagesFields):
            sampling = SamplingFields(
                max_tokens=fields.max_tokens,
                temperature=fields.temperature,
                top_p=fields.top_p,
                top_k=fields.top_k,
                stop=fields.stop_sequences,
            )
        arguments = arguments_of(sampling, model, self._options)
        arguments.chat_template_kwargs = fields.template_variables()
        return asked, arguments

    async def _body(self, http: Request) -> bytes:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in http.stream():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > self._limits.max_body:
                        raise too_large(size, self._limits.max_body)
        except TimeoutError:
            raise RequestError(
                f"the body took longer than {self._limits.body_seconds:g} s",
                "send it faster",
                status=408,
            ) from None
        http.state.size = size
        return b"".join(chunks)

    async def _fetch_images(self, messages: list[dict[str, Any]]) -> None:
        provider = self.generator.model_provider
        if provider.processor is None:
            tool_images.omit(messages)
        parts = [
            part
            for message in messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
            if part.get("type") != "text"
        ]
        if not parts:
            return
        if provider.processor is None:
            raise RequestError(
                "this model takes no images",
                "send text, or serve a vision model",
                param="messages",
            )
        await asyncio.to_thread(images.inline, messages)
        tool_images.place(messages, provider.tokenizer, provider.processor)

    def _openai_form(
        self, kind: Any, fields: SamplingFields, arguments: GenerationArguments
    ) -> OpenAIForm:
        options = fields.stream_options
        return OpenAIForm(
            kind,
            fields.model or DEFAULT_MODEL,
            self._fingerprint,
            with_logprobs=arguments.logprobs or arguments.top_logprobs > 0,
            with_usage=bool(options and options.include_usage),
        )

    def _check_waiting(self) -> None:
        waiting = sum(not one.started for one in self.generator.open_tickets())
        waiting += self._long_texts.count
        if waiting >= self._limits.max_waiting:
            raise RequestError(
                f"{waiting} requests wait already, --max-queue allows "
                f"{self._limits.max_waiting}",
                "ask again in 2 s",
                status=503,
                code="queue_full",
                retry_after=2,
            )

    async def _answer(
        self,
        http: Request,
        asked: CompletionRequest,
        arguments: GenerationArguments,
        form: OpenAIForm | AnthropicForm,
        is_streamed: bool | None,
    ) -> Response:
        self._check_waiting()
        relay = Relay(self._limits.request_seconds)
        await self._long_texts.prepare(http.state.size, asked, arguments)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(
                    relay.asked(self.generator, asked, arguments, http)
                )
                answer = Answer(relay, asked.tools)
                stack.enter_context(self._account(http, relay, answer))
                if not is_streamed:
                    whole = Piece()
                    async for piece in answer.pieces():
                        _add(whole, piece)
                    return JSONResponse(form.whole(whole, answer.usage))
            except (Gone, ClientDisconnect):
                return Response(status_code=_HUNG_UP)
            left_open = stack.pop_all()
        return StreamingResponse(
            self._events(left_open, answer, form),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _events(
        self,
        left_open: contextlib.AsyncExitStack,
        answer: Answer,
        form: OpenAIForm | AnthropicForm,
    ) -> AsyncIterator[bytes]:
        async with left_open:
            try:
                is_first = True
                async for piece in answer.pieces():
                    if is_first:
                        is_first = False
                        for event in form.start(answer):
                            yield event
                    if piece.read is not None:
                        yield form.alive(piece.read)
                        continue
                    for event in form.chunk(piece, answer):
                        yield event
                for event in form.end(answer):
                    yield event
            except RequestError as error:
                logging.warning("A stream ended early: %s", error)
                yield form.failed(error)
            except Gone:
                pass

    @contextlib.contextmanager
    def _account(self, http: Request, relay: Relay, answer: Answer) -> Any:
        """Count what an answer took, and write its line in the log."""
        try:
            yield
        finally:
            usage, seconds = answer.usage, relay.seconds()
            self.metrics.count(usage)
            self.metrics.whole.observe(seconds)
            if answer.first_token_after is not None:
                self.metrics.first_token.observe(answer.first_token_after)
            logging.info(
                "%s: %d tokens of prompt, %d of them cached; %d generated; %.2f s%s",
                http.url.path,
                usage.prompt,
                usage.cached,
                usage.generated,
                seconds,
                "" if relay.ticket.is_done else "; ended early",
            )


def _add(whole: Piece, piece: Piece) -> None:
    whole.text += piece.text
    whole.reasoning += piece.reasoning
    whole.calls += piece.calls
    whole.tokens += piece.tokens
    whole.finish = piece.finish

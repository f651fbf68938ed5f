"""`SharedReading`: mlx-lm's generation loop, where no prompt is read twice.

Owns what a request's prompt is cut into, so that states are kept where later texts may
part from it, and which requests wait: one that begins like a prompt that is being read
goes on from there when that is done, instead of reading the same beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx_lm.server as host_server

from ..conversations.index import BLOCK, Tokens, as_tokens, common_length
from ..conversations.snapshots import CLOSE
from .places import Parts, cut_at_places, parts_of

#: A prompt's tokens, its segments, their kinds, the answer's first state, images.
Tokenized = tuple[list[int], list[list[int]], list[str], str, Any]


class _Reading:
    """A prompt that the loop reads, and where its answers go, as the loop sees it.

    Args:
        model: As the request names it.
        tokens: The prompt.
        answers: The queue that the client reads.
    """

    def __init__(self, model: Any, tokens: Tokens, answers: Any) -> None:
        self.model, self.tokens, self._answers = model, tokens, answers
        self._has_answer = False
        self._context: host_server.GenerationContext | None = None

    def put(self, item: Any) -> None:
        """Hand on a context, progress (a tuple), or a part of the answer."""
        if isinstance(item, host_server.GenerationContext):
            self._context = item
        elif not isinstance(item, tuple):
            self._has_answer = True
        self._answers.put(item)

    @property
    def is_over(self) -> bool:
        """Whether it is read, refused or given up."""
        given_up = self._context is not None and self._context._should_stop
        return self._has_answer or given_up


class SharedReading(host_server.ResponseGenerator):  # type: ignore[misc]
    """Reads what requests have in common once.

    ``model_provider`` has ``empty_caches``, a prompt cache as its models', and a flag
    ``keeps_all``: whether it can be cut anywhere. ``prompt_cache`` is a `PromptStore`.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        # The loop's thread starts in there.
        self._reading: list[_Reading] = []
        self._waiting: list[tuple[Any, Any, Any]] = []
        # By the request's id, with the request, so that the id stays its own.
        self._tokenized: dict[int, tuple[Any, Tokenized]] = {}
        super().__init__(*arguments, **named)

    def _generate(self) -> None:
        store = self.prompt_cache
        try:
            super()._generate()
        finally:
            store.close()

    def _next_request(self, timeout: float | None = None) -> Any:
        for i, (_, asked, _) in enumerate(self._waiting):
            if not self._is_read_elsewhere(self._waiting[i]):
                self._tokenized.pop(id(asked), None)  # there are other places by now
                return self._begin(self._waiting.pop(i))
        soon = 0.01 if self._waiting and timeout else timeout
        request = super()._next_request(soon)
        if request is None or self._is_distributed:
            if request is None and timeout:
                self.prompt_cache.idle()
            return request
        if self._is_read_elsewhere(request):
            self._waiting.append(request)
            return None
        return self._begin(request)

    def _begin(self, request: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Remember that the loop reads a request's prompt from now on."""
        answers, asked, arguments = request
        tokens = self._prompt_of(asked, arguments)
        if tokens is not None:
            reading = _Reading(arguments.model, tokens, answers)
            self._reading.append(reading)
            return reading, asked, arguments
        return request

    def _is_read_elsewhere(self, request: tuple[Any, Any, Any]) -> bool:
        """Whether a prompt that is being read has more in common than the store."""
        _, asked, arguments = request
        store, key = self.prompt_cache, self.model_provider.model_key
        self._reading = [one for one in self._reading if not one.is_over]
        tokens = self._prompt_of(asked, arguments) if self._reading else None
        if tokens is None:
            return False
        there = (
            common_length(one.tokens, tokens)
            for one in self._reading
            if one.model == arguments.model
        )
        here: int = store.in_common(key, tokens)
        return max(there, default=0) >= here + BLOCK

    def _prompt_of(self, asked: Any, arguments: Any) -> Tokens | None:
        """A request's tokens; None if it has none that say all, or cannot be read."""
        tokenizer = self.model_provider.tokenizer
        if tokenizer is None:
            return None  # nothing is loaded yet
        if id(asked) not in self._tokenized:
            try:
                tokenized = self._tokenize(tokenizer, asked, arguments)
            except Exception:
                return None  # the loop will find the same, and say it
            self._tokenized[id(asked)] = asked, tokenized
        prompt, *_, images = self._tokenized[id(asked)][1]
        return None if images is not None else as_tokens(prompt)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Tokenized:
        _, before = self._tokenized.pop(id(request), (None, None))
        if before is not None:
            return before
        tokenized: Tokenized = super()._tokenize(tokenizer, request, args)
        prompt, _, _, state, images = tokenized
        provider = self.model_provider
        networks = [provider.model, provider.draft_model]
        self.prompt_cache.open(
            provider.model_key, [n for n in networks if n], provider.empty_caches
        )
        if provider.keeps_all or images is not None or not prompt:
            return tokenized
        parts = Parts()
        if request.request_type == "chat" and tokenizer.has_chat_template:
            options = {
                **provider.cli_args.chat_template_args,
                **(args.chat_template_kwargs or {}),
                "tools": request.tools,
                "tokenize": True,
                "add_generation_prompt": False,
            }
            render = functools.partial(tokenizer.apply_chat_template, **options)
            parts = parts_of(render, request.messages, prompt)
        # Where texts have parted once they will again, or a little before: a line with
        # the time, say.
        text = as_tokens(prompt)
        parted = self.prompt_cache.in_common(provider.model_key, text) - CLOSE
        known = self.prompt_cache.in_reach(provider.model_key, text)
        others = [parted] if parted > known else []
        segments, kinds = cut_at_places(prompt, parts, others)
        return prompt, segments, kinds, state, None

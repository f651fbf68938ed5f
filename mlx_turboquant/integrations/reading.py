"""`SharedReading`: mlx-lm's generation loop, where no prompt is read twice.

Owns what a request's prompt is cut into, so that states are kept where later texts may
part from it; that long prompts are tokenized elsewhere than on the loop's thread; which
requests wait: one that begins like a prompt that is being read goes on from there when
that is done, instead of reading the same beside it; and that what was read of a text
that is given up is kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm.server as host_server

from ..conversations.index import BLOCK, Tokens, as_tokens, common_length
from .places import Parts, cut_at_places, parts_of_chat
from .rows import keep_rows

#: A prompt's tokens, its segments, their kinds, the answer's first state, images.
Tokenized = tuple[list[int], list[list[int]], list[str], str, Any]
#: The queue for its answers, a request, and its arguments.
Request = tuple[Any, Any, Any]


@dataclass(frozen=True)
class _Prepared:
    """What `SharedReading.prepare` has made of a request: its ``prepared``.

    Attributes:
        tokenizer: Whose tokens.
        tokenized: What mlx-lm makes of it.
        parts: Where the parts of its prompt end.
    """

    tokenizer: Any
    tokenized: Tokenized
    parts: Parts


class _Reading:
    """A prompt that the loop reads, until its answer begins.

    Args:
        model: As the request names it.
        tokens: The prompt.
        answers: The queue that the loop puts everything on; it is looked at on the way.
    """

    def __init__(self, model: Any, tokens: Tokens, answers: Any) -> None:
        self.model, self.tokens = model, tokens
        self._has_answer = False
        self._context: host_server.GenerationContext | None = None
        put = answers.put

        def watched(item: Any) -> None:
            self._see(item)
            put(item)

        answers.put = watched

    def _see(self, item: Any) -> None:
        if isinstance(item, host_server.GenerationContext):
            self._context = item
        elif not isinstance(item, tuple):  # as progress is
            self._has_answer = True

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
        # Requests, with their tokens.
        self._waiting: list[tuple[Request, Tokens]] = []
        # What the loop was given last, until it has begun with it.
        self._latest: Request | None = None
        super().__init__(*arguments, **named)

    def _generate(self) -> None:
        self._reading = []
        with keep_rows(self._keep):
            super()._generate()

    def _keep(self, tokens: list[int], caches: list[Any], is_cut_off: bool) -> None:
        """Keep what a text has been read up to, if that is more than there is."""
        if is_cut_off and not self.model_provider.keeps_all:
            return  # states of layers that have seen the step cannot go back
        key = self.model_provider.model_key
        behind = as_tokens([*tokens, 0])  # whose last token is not looked for
        if self.prompt_cache.in_reach(key, behind) < len(tokens):
            self.prompt_cache.insert_cache(key, tokens, caches)

    def _run_generate(self) -> None:
        store = self.prompt_cache  # mlx-lm's loop drops it at its end
        try:
            super()._run_generate()
        finally:
            store.close()
            mx.clear_streams()  # or their threads outlive this one and abort the exit

    def prepare(self, request: Any, args: Any) -> None:
        """Tokenize a request on the caller's thread, so that the loop need not.

        That is of use if it means the model that is loaded now, as most do.
        """
        tokenizer = self.model_provider.tokenizer
        has_images = any(host_server._image_parts(request.messages))
        if tokenizer is None or has_images or self._is_distributed:
            return
        try:
            asked = copy.deepcopy(request)  # mlx-lm rewrites messages
            tokenized = self._prompt_of(tokenizer, asked, args)
            parts = self._parts_of(tokenizer, asked, args, tokenized[0])
        except Exception:
            return  # the loop will find the same, and say it
        request.prepared = _Prepared(tokenizer, tokenized, parts)

    def _prompt_of(self, tokenizer: Any, request: Any, args: Any) -> Tokenized:
        """As mlx-lm's `_tokenize`; prompts may be token ids already."""
        prepared = getattr(request, "prepared", None)
        if prepared is not None and prepared.tokenizer is tokenizer:
            prompt, segments, kinds, state, images = prepared.tokenized
            return prompt, [*segments], [*kinds], state, images
        if not isinstance(request.prompt, list):
            tokenized: Tokenized = super()._tokenize(tokenizer, request, args)
            return tokenized
        prompt = list(request.prompt)
        return prompt, [prompt], ["assistant"], "normal", None

    def _next_request(self, timeout: float | None = None) -> Request | None:
        self._latest = self._next(timeout)
        return self._latest

    def _next(self, timeout: float | None) -> Request | None:
        self._reading = [one for one in self._reading if not one.is_over]
        for i, (request, tokens) in enumerate(self._waiting):
            if not self._is_read_elsewhere(request, tokens):
                self._waiting.pop(i)
                return request
        soon = 0.01 if self._waiting and timeout else timeout
        taken: Request | None = super()._next_request(soon)
        if taken is None and timeout and not self._waiting:
            self.prompt_cache.idle(lambda: self._stop or not self.requests.empty())
        counts_only = taken is not None and taken[2].max_tokens == 0
        if taken is None or counts_only or self._is_distributed or not self._reading:
            return taken
        text = self._tokens_of_request(taken)
        if text is not None and self._is_read_elsewhere(taken, text):
            self._waiting.append((taken, text))
            return None
        return taken

    def _is_read_elsewhere(self, request: Request, tokens: Tokens) -> bool:
        """Whether a prompt that is being read has more in common than the store."""
        there = (
            common_length(one.tokens, tokens)
            for one in self._reading
            if one.model == request[2].model
        )
        here: int = self.prompt_cache.in_common(self.model_provider.model_key, tokens)
        return max(there, default=0) >= here + BLOCK

    def _tokens_of_request(self, request: Request) -> Tokens | None:
        """What the loop will find; None if it has no tokens that say all."""
        _, asked, arguments = request
        try:
            tokenizer = self.model_provider.tokenizer
            if not hasattr(asked, "prepared"):
                asked = copy.deepcopy(asked)  # mlx-lm rewrites messages
            prompt, *_, images = self._prompt_of(tokenizer, asked, arguments)
        except Exception:
            return None  # the loop will find the same, and say it
        return None if images is not None else as_tokens(prompt)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Tokenized:
        latest, self._latest = self._latest, None
        tokenized = self._prompt_of(tokenizer, request, args)
        prompt, _, _, state, images = tokenized
        if images is not None or not prompt:
            return tokenized
        provider, store = self.model_provider, self.prompt_cache
        text = as_tokens(prompt)
        if latest is not None and latest[1] is request:
            self._reading.append(_Reading(args.model, text, latest[0]))
        networks = [provider.model, provider.draft_model]
        key = provider.model_key
        store.open(key, [n for n in networks if n], provider.empty_caches)
        if provider.keeps_all:
            return tokenized
        parts = self._parts_of(tokenizer, request, args, prompt)
        segments, kinds = cut_at_places(prompt, parts, store.parted(key, text))
        return prompt, segments, kinds, state, None

    def _parts_of(
        self, tokenizer: Any, request: Any, args: Any, prompt: list[int]
    ) -> Parts:
        """Where the parts of a request's prompt end, if states are kept there."""
        prepared = getattr(request, "prepared", None)
        if prepared is not None and prepared.tokenizer is tokenizer:
            found: Parts = prepared.parts
            return found
        provider = self.model_provider
        if request.request_type != "chat" or provider.keeps_all:
            return Parts()
        options = {
            **provider.cli_args.chat_template_args,
            **(args.chat_template_kwargs or {}),
            "tools": request.tools,
        }
        return parts_of_chat(tokenizer, request.messages, prompt, options)

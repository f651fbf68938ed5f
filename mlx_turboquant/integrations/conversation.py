"""`Conversation`: a long chat whose cache goes along with its text.

A turn reads only what the cache has not seen, whatever a chat template rewrites: caches
that can be cut are cut where the texts part, of others the states at the ends of turns
are kept. Asking and showing is the command line's.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..conversations import stops
from ..errors import FormatError, SpecError
from ..explanation import Explanation, explain
from .chat_template import render
from .compiled_step import compiled
from .loading import check_context, context_length
from .model_folder import check_tokens
from .model_identity import is_same, metadata_of
from .places import Parts, parts_of
from .prompt_files import load_prompt_cache, save_prompt_cache
from .prompt_store import PromptStore
from .stock import keeps_all, labelled_leaves, length_of

_KIND = "mlx_turboquant chat"


class Conversation:
    """One chat.

    Args:
        network: A loaded model.
        tokenizer: Its tokenizer; without a chat template, turns are joined as they are.
        make_cache: Makes an empty prompt cache.
        system: A system prompt, or None.
        name: The model's, kept in saved chats.
        template: Options of the chat template.
        adapter: The folder of adapters that the model was loaded with, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        make_cache: Callable[[], list[Any]],
        system: str | None = None,
        name: str = "",
        template: dict[str, Any] | None = None,
        adapter: str | None = None,
    ) -> None:
        self.network, self.tokenizer, self.name = network, tokenizer, name
        self._adapter = adapter
        self._stepping = compiled(network)
        self._make_cache, self._template = make_cache, template or {}
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.cache = self._make_cache()
        self._places = PromptStore(max_size=1)
        self._text_tokens: list[int] = []
        # The cache has seen all of them but, usually, the last one of an answer.
        self._cached_tokens: list[int] = []

    @property
    def tokens(self) -> int:
        """Tokens the cache holds."""
        return len(self._cached_tokens)

    @property
    def context(self) -> int | None:
        """Tokens the model was made for; None if it does not say."""
        return context_length(self.network)

    def explain(self) -> Explanation:
        """What the cache stores."""
        return explain(self.cache)

    def say(self, text: str, **options: Any) -> Generator[Any, None, None]:
        """Answer ``text``, and remember both; yields mlx-lm's responses.

        An answer that the caller stops, by closing this, is kept as far as it came.

        Args:
            text: The user's turn.
            options: For ``mlx_lm.stream_generate``.

        Raises:
            UnsupportedError: if the chat would be longer than the model's context; the
                turn is not kept then.
            SpecError: if it has no tokens, or the chat template cannot write it;
                likewise.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._encode(messages, text)
        if not tokens:
            raise SpecError("the text has no tokens; type some other")
        check_context(
            self.network, len(tokens), "the chat would have", "/reset starts over"
        )
        check_tokens(self.network, tokens, "the chat")
        if self.context is not None and "max_tokens" in options:
            room = max(1, self.context - len(tokens))
            options["max_tokens"] = min(options["max_tokens"], room)
        start = self._rewind_to(tokens)
        begun, answer, generated = time.perf_counter(), "", []
        try:
            read = self._read_places(messages, tokens, start, **options)
            seconds = time.perf_counter() - begun
            rest = tokens[start + read :]
            for response in stream_generate(
                self._stepping, self.tokenizer, rest, prompt_cache=self.cache, **options
            ):
                answer += response.text
                generated.append(int(response.token))
                yield _with_read(response, read, seconds)
        finally:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self._text_tokens = [*tokens, *generated]
            seen = length_of(self.cache)
            self._cached_tokens = self._text_tokens[: -1 if seen is None else seen]

    def _encode(self, messages: list[dict[str, str]], text: str) -> list[int]:
        if self.tokenizer.has_chat_template:
            written = render(self.tokenizer, messages, self._template)
            return list(self.tokenizer.encode(written, add_special_tokens=False))
        if not self._text_tokens and len(messages) > 1:
            text = f"{messages[0]['content']}\n{text}"
        first = not self._text_tokens
        new = self.tokenizer.encode(text, add_special_tokens=first)
        return [*self._text_tokens, *new]

    def _rewind_to(self, tokens: list[int]) -> int:
        """Make the cache hold a prefix of ``tokens``; returns its length."""
        shared = 0
        for cached, token in zip(self._cached_tokens, tokens[:-1], strict=False):
            if cached != token:
                break
            shared += 1
        extra = len(self._cached_tokens) - shared
        if extra and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, extra)
        elif extra:  # a state that cannot go back
            found, rest = self._places.fetch_nearest_cache(None, tokens)
            self.cache = self._make_cache() if found is None else found
            shared = len(tokens) - len(rest)
        self._cached_tokens = self._cached_tokens[:shared]
        return shared

    def _read_places(
        self,
        messages: list[dict[str, str]],
        tokens: list[int],
        start: int,
        prefill_step_size: int = 2048,
        **ignored: Any,
    ) -> int:
        """Keep states that cannot go back while a turn is read; how many tokens were.

        That is all but the last if there are such states, else none.

        Args:
            messages: The chat.
            tokens: Its text.
            start: Tokens that the cache has seen.
            prefill_step_size: Tokens to read at once.
            ignored: Other options of the answer.
        """
        if all(keeps_all(leaf) for _, leaf in labelled_leaves(self.cache)):
            return 0
        parts = Parts()
        if self.tokenizer.has_chat_template:
            options = {**self._template, "tokenize": True}
            options["add_generation_prompt"] = False
            render = functools.partial(self.tokenizer.apply_chat_template, **options)
            parts = parts_of(render, messages, tokens)
        places, before = stops(len(tokens), parts.ends, parts.beginning), start
        for place in [place for place in places if place > start]:
            steps = [*range(start, place, prefill_step_size), place]
            for first, last in itertools.pairwise(steps):
                self.network(mx.array(tokens[first:last])[None], cache=self.cache)
                mx.eval([cache.state for cache in self.cache])
            start, kept = place, copy.deepcopy(self.cache)
            self._places.insert_cache(None, tokens[:place], kept, cache_type="user")
        return start - before

    def save(self, path: str | Path) -> None:
        """Write messages and cache to a prompt-cache file.

        Raises:
            SpecError: if there can be no such file.
        """
        mx.eval([cache.state for cache in self.cache])
        save_prompt_cache(
            path,
            self.cache,
            {
                "kind": _KIND,
                **metadata_of(self.name, self._adapter),
                "messages": json.dumps(self.messages),
                "held": json.dumps(self._cached_tokens),
                "tokens": json.dumps(self._text_tokens),
            },
        )

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote; a failure changes nothing.

        Raises:
            FormatError: if it is none, or of another model.
            UnsupportedModelError: if the cache is another model's.
            UnsupportedError: if this is one machine of several.
        """
        cache, metadata = load_prompt_cache(path, self.network, return_metadata=True)
        if metadata.get("kind") != _KIND:
            raise FormatError(
                f"{path} is a prompt cache but no chat; use --prompt-cache-file of "
                "mlx_tq.generate"
            )
        if not is_same(metadata, self.name, self._adapter):
            raise FormatError(
                f"{path} is a chat with {metadata.get('model')!r}, not {self.name!r} "
                "as it is here; start mlx_tq.chat with that model"
            )
        seen = length_of(cache)
        messages, held, tokens = _said(metadata, str(path))
        if held != tokens[: len(held)] or seen not in (None, len(held)):
            raise FormatError(
                f"{path} is damaged: {len(held)} tokens are said to be in a cache of "
                f"{seen}; its chat cannot go on"
            )
        check_tokens(self.network, tokens, str(path))
        self.messages, self._cached_tokens, self._text_tokens = messages, held, tokens
        self.cache = cache


def _said(
    metadata: dict[str, str], path: str
) -> tuple[list[dict[str, str]], list[int], list[int]]:
    """Messages, tokens that the cache has seen and all tokens, of a saved chat.

    Raises:
        FormatError: if they are something else.
    """
    try:
        messages, held, tokens = (
            json.loads(metadata[name]) for name in ("messages", "held", "tokens")
        )
        are_tokens = all(
            isinstance(ids, list) and all(type(token) is int for token in ids)
            for ids in (held, tokens)
        )
        are_messages = isinstance(messages, list) and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in messages
        )
    except (KeyError, ValueError, RecursionError):
        are_tokens = are_messages = False
    if not (are_tokens and are_messages):
        raise FormatError(f"{path} is damaged: its messages or tokens are none")
    return messages, held, tokens


def _with_read(response: Any, tokens: int, seconds: float) -> Any:
    """A response of mlx-lm's, with tokens of the prompt that were read before it."""
    if not tokens:
        return response
    seconds += response.prompt_tokens / max(response.prompt_tps, 1e-9)
    count = response.prompt_tokens + tokens
    return replace(response, prompt_tokens=count, prompt_tps=count / seconds)

"""`Conversation`: a long chat that reads nothing twice.

A turn goes on from the text in its `PromptStore` that has most of its beginning: the
turn before, a chat that was started over, a turn that was taken back, another chat of
the store, or a text in its folder. It works on a fork, so a turn that fails has changed
nothing. Asking and showing is the command line's, files are ``chat_files.py``'s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import stream_generate

from ..conversations import common_length
from ..conversations.index import as_tokens
from ..entries import PromptCache
from ..errors import SpecError
from ..explanation import Explanation, explain
from .chat_files import SavedChat, load_chat, save_chat
from .chat_template import render
from .compiled_step import compiled
from .fingerprint import fingerprint
from .kept_text import KeptText
from .loading import check_context, context_length
from .model_folder import check_tokens
from .places import Parts, parts_of_chat
from .prompt_reading import PartRead, read_prompt, segments_of
from .prompt_store import PromptStore
from .stock import length_of

Message = dict[str, str]


@dataclass(frozen=True)
class _Reached:
    """A cache on its way through a text.

    Attributes:
        key: Whose it is, as the store has it.
        cache: The prompt cache.
        length: Tokens of the text that it has seen.
    """

    key: bytes
    cache: list[Any]
    length: int


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
        store: Where it keeps what it has read and looks for what others have; chats of
            one thread may share it. Whoever made it writes and closes it. By default
            one of its own, with room for one text.

    Attributes:
        messages: Roles and contents, in the order of the chat.
        cached_tokens: Tokens of the latest prompt that were reused.
        store: As given.
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
        store: PromptStore | None = None,
    ) -> None:
        self.network, self.tokenizer, self.name = network, tokenizer, name
        self._adapter = adapter
        self._stepping = compiled(network)
        self._make_cache, self._template = make_cache, template or {}
        self._system = system
        self.store = PromptStore(max_size=1) if store is None else store
        empty = make_cache()
        self._own_key = fingerprint([network], empty)
        self.store.open(self._own_key, [network], empty)
        self.reset()

    def reset(self) -> None:
        """Start over; the next turn reuses what it has in common with this chat."""
        self.messages: list[Message] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.cached_tokens = 0
        self._text_tokens: list[int] = []
        # Tokens of the text before each turn.
        self._turns: list[int] = []
        self._reached = _Reached(self._own_key, self._make_cache(), 0)

    @property
    def tokens(self) -> int:
        """Tokens the cache holds."""
        return self._reached.length

    @property
    def cache(self) -> list[Any]:
        """A prompt cache that has seen the chat. The next turn works on another."""
        return self._reached.cache

    @property
    def has_own_bits(self) -> bool:
        """Whether the cache is as `make_cache` makes them, not a file's of others."""
        return self._reached.key == self._own_key

    @property
    def context(self) -> int | None:
        """Tokens the model was made for; None if it does not say."""
        return context_length(self.network)

    def explain(self) -> Explanation:
        """What the cache stores."""
        return explain(self.cache)

    def say(self, text: str, **options: Any) -> Generator[Any, None, None]:
        """Answer ``text``, and remember both; yields mlx-lm's responses.

        Their ``prompt_tokens`` are those that were read; `cached_tokens` were reused.
        An answer that the caller stops, by closing this, is kept as far as it came, and
        so is one in which Ctrl-C is hit. A turn that ends in any other way, or in
        Ctrl-C before its answer has begun, is not kept: the chat is as it was before.

        Args:
            text: The user's turn.
            options: For ``mlx_lm.stream_generate``.

        Raises:
            UnsupportedError: if the chat would be longer than the model's context.
            SpecError: if it has no tokens, or the chat template cannot write it.
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
        at = self._nearest(tokens)
        self.cached_tokens = at.length
        answer, generated = "", list[int]()
        try:
            step = options.get("prefill_step_size", 2048)
            read = self._read(messages, tokens, at, step)
            rest, options["prompt_cache"] = tokens[at.length + read.tokens :], at.cache
            for response in stream_generate(
                self._stepping, self.tokenizer, rest, **options
            ):
                answer += response.text
                generated.append(int(response.token))
                yield read.added_to(response)
        except GeneratorExit:
            pass  # the caller has enough
        except KeyboardInterrupt:
            if generated:  # in some layers the cache may have seen one more
                self._end_turn(messages, answer, [*tokens, *generated], None)
            raise
        self._end_turn(messages, answer, [*tokens, *generated], at)

    def _encode(self, messages: list[Message], text: str) -> list[int]:
        if self.tokenizer.has_chat_template:
            return self._encode_chat(messages)
        if not self._text_tokens and len(messages) > 1:
            text = f"{messages[0]['content']}\n{text}"
        first = not self._text_tokens
        new = self.tokenizer.encode(text, add_special_tokens=first)
        return [*self._text_tokens, *new]

    def _encode_chat(self, messages: list[Message], answers: bool = True) -> list[int]:
        written = render(self.tokenizer, messages, self._template, answers)
        return list(self.tokenizer.encode(written, add_special_tokens=False))

    def _nearest(self, tokens: list[int]) -> _Reached:
        """A cache that has seen most of ``tokens``, the last of which is always read.

        What the store has is forked, and so is this chat's own cache if the store could
        not keep it.
        """
        text, own = as_tokens(tokens)[:-1], self._reached
        kept = KeptText(own.key, as_tokens(self._text_tokens[: own.length]), own.cache)
        length = kept.usable(common_length(kept.tokens, text))
        for key in dict.fromkeys((own.key, self._own_key)):
            found, rest = self.store.fetch_nearest_cache(key, tokens)
            if key == own.key and len(tokens) - len(rest) < length:
                found, rest = kept.fork(length), tokens[length:]
            if found is not None:
                break
        # A list that knows what was decided on its layers.
        cache = PromptCache((), ()) if key != self._own_key else self._make_cache()
        if found is not None:
            cache[:] = found
        return _Reached(key, cache, len(tokens) - len(rest))

    def _read(
        self, messages: list[Message], tokens: list[int], at: _Reached, step: int
    ) -> PartRead:
        """Read a turn's text but for the last token, and keep what was read."""

        def find_parts() -> Parts:
            return parts_of_chat(self.tokenizer, messages, tokens, self._template)

        def keep(place: int, kind: str) -> None:
            kept = copy.deepcopy(at.cache)
            self.store.insert_cache(at.key, tokens[:place], kept, cache_type=kind)

        parted = self.store.parted(at.key, as_tokens(tokens))
        segments = segments_of(tokens, at.cache, find_parts, parted)
        return read_prompt(self.network, at.cache, segments, at.length, step, keep)

    def _end_turn(
        self, messages: list[Message], answer: str, text: list[int], at: _Reached | None
    ) -> None:
        """Be at the end of an answer, and give up the text of the turn before.

        ``at`` is what has seen the text; None if it is not known how much of it.
        """
        if at is None:
            at = self._nearest([*text, 0])
        else:
            seen = length_of(at.cache)
            at = replace(at, length=len(text) if seen is None else min(seen, len(text)))
        before = self._reached
        # A template that cuts its thinking would have it written for nothing.
        self.store.give_up(before.key, self._text_tokens[: before.length])
        self._turns.append(len(self._text_tokens))
        self._keep([*messages, {"role": "assistant", "content": answer}], text, at)

    def _keep(self, messages: list[Message], text: list[int], at: _Reached) -> None:
        """Be at the end of a text, and keep what has seen it."""
        self.messages, self._text_tokens, self._reached = messages, text, at
        self.store.insert_cache(at.key, text[: at.length], at.cache)

    def _stand(self, messages: list[Message], text: list[int] | None = None) -> None:
        """Be at the end of a chat of which something is kept already, or nothing.

        Args:
            messages: The chat.
            text: Its tokens; None to ask the chat template.
        """
        if text is None:
            is_empty = all(said["role"] != "user" for said in messages)
            text = [] if is_empty else self._encode_chat(messages, answers=False)
        self._reached = self._nearest([*text, 0])
        self.messages, self._text_tokens = messages, text

    def undo(self) -> str:
        """Take the last turn back; returns what the user had said.

        Raises:
            SpecError: if there is none, or it is not known where it begins.
        """
        users = [i for i, said in enumerate(self.messages) if said["role"] == "user"]
        if not users:
            raise SpecError("there is no turn to take back")
        text = None
        if not self.tokenizer.has_chat_template:
            if not self._turns:
                raise SpecError(
                    "where the last turn begins is not kept in a file, and there is no "
                    "chat template to say it; /reset starts over"
                )
            text = self._text_tokens[: self._turns[-1]]
        said = self.messages[users[-1]]["content"]
        self._stand(self.messages[: users[-1]], text)
        self._turns = self._turns[:-1]
        return said

    def change_system(self, system: str | None) -> None:
        """Have another system prompt, or none, from the next turn on.

        Raises:
            SpecError: if the text has begun, and no chat template writes it anew.
        """
        if self._text_tokens and not self.tokenizer.has_chat_template:
            raise SpecError(
                "without a chat template the system prompt is the text's beginning, "
                "which is written; /reset first"
            )
        rest = [said for said in self.messages if said["role"] != "system"]
        first = [] if system is None else [{"role": "system", "content": system}]
        self._stand([*first, *rest])
        self._system = system

    def save(self, path: str | Path) -> None:
        """Write messages and cache to a prompt-cache file.

        Raises:
            SpecError: if there can be no such file.
        """
        held = self._text_tokens[: self.tokens]
        chat = SavedChat(self.messages, self._text_tokens, held, self.cache)
        save_chat(path, chat, self.name, self._adapter)

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote; a failure changes nothing.

        A cache of other bits than this chat's stays out of the store's folder.

        Raises:
            FormatError: if it is none, or of another model.
            UnsupportedModelError: if the cache is another model's.
            UnsupportedError: if this is one machine of several.
        """
        chat = load_chat(path, self.network, self.name, self._adapter)
        key = fingerprint([self.network], chat.cache)
        self._turns = []
        at = _Reached(key, chat.cache, len(chat.held))
        self._keep(chat.messages, chat.tokens, at)

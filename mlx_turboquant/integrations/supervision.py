"""`SupervisedGenerator`: the generation thread that no request ends.

Owns the life of mlx-lm's thread: that its start is known to have worked, that a fault
in it fails the requests that it had begun with, once, and lets it go on with others,
and that it ends in time. What depends on the loaded model is checked here, on that
thread, before a request joins a batch.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.server as host_server

from ..conversations.index import as_tokens
from ..errors import RequestError, TurboQuantError, UnsupportedModelError
from ..pacing import Interrupted, give_up_when
from .admission import Admission
from .loading import context_length
from .prompt_store import PromptStore
from .rows import guard_batches
from .server import Generator, Provider
from .tickets import Cancelled, Line, Ticket

#: Faults that come faster than this are not tried again at once.
_PAUSE = 1.0
#: Seconds that a text gets to be written which was begun in time.
_LAST_TEXT = 2.0


class TokensCounted(Exception):
    """What a request ends with that asks for its number of tokens only."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens")
        self.count = count


class SupervisedGenerator(Generator):
    """Serves requests, whatever they are.

    Args:
        provider: Loads the models.
        store: Caches of texts.
        kv_memory: Bytes that all caches may take; None for any.

    Attributes:
        admission: Decides which requests fit, if memory is bounded.
        faults: How often the thread had to begin anew.
        kept: Texts that are kept for reuse, and their bytes, as of a moment ago: what
            other threads may look at.
    """

    def __init__(
        self,
        provider: Provider,
        store: PromptStore,
        kv_memory: int | None = None,
    ) -> None:
        guard_batches()
        self.admission = None
        if kv_memory is not None:
            self.admission = Admission(kv_memory, store, self.open_tickets)
        self.faults = 0
        self.kept = 0, 0
        self._counted_at = 0.0
        self._is_ending, self._end_by = False, math.inf
        self._vocabulary: tuple[Any, int] = (None, 0)
        self._loaded = threading.Event()
        self._start_error: Exception | None = None
        self._open: set[Ticket] = set()
        self._lock = threading.Lock()
        super().__init__(provider, store)
        self.requests = Line()

    def wait_until_loaded(self) -> None:
        """Return once the model is there.

        Raises:
            UnsupportedModelError: if it cannot be loaded, or its chat template used.
            SpecError: if its caches do not fit in memory.
        """
        self._loaded.wait()
        if self._start_error is not None:
            raise self._start_error

    def submit(self, ticket: Ticket, request: Any, arguments: Any) -> None:
        """Hand a request to the thread; ``ticket`` gets what becomes of it."""
        with self._lock:
            self._open = {one for one in self._open if one.is_open} | {ticket}
        self.requests.put((ticket, request, arguments))

    def open_tickets(self) -> list[Ticket]:
        """Requests that somebody waits for."""
        with self._lock:
            return [one for one in self._open if one.is_open]

    def _run_generate(self) -> None:
        store = self.prompt_cache  # mlx-lm's loop drops it at its end
        give_up_when(lambda: self._stop)
        try:
            self._load_first()
            while not self._stop:
                begun = time.monotonic()
                try:
                    self._generate()
                except Interrupted:
                    pass
                except Exception as fault:
                    self._recover(fault)
                    if time.monotonic() - begun < _PAUSE:
                        time.sleep(_PAUSE)
        finally:
            self._generation_failed = self._start_error is not None
            self.cut_off()
            store.close(self._end_by)
            mx.clear_streams()  # or their threads outlive this one and abort the exit

    def _load_first(self) -> None:
        try:
            self.model_provider.load_default()
            _try_template(self.model_provider.tokenizer, self.cli_args)
            if self.admission is not None and self.model_provider.model is not None:
                self.admission.check(self.model_provider)
        except TurboQuantError as error:
            self._start_error = error
        except Exception as error:
            given = self.cli_args
            extras = {"adapters": given.adapter_path, "draft model": given.draft_model}
            named = "".join(f", {what} {of!r}" for what, of in extras.items() if of)
            self._start_error = UnsupportedModelError(
                f"cannot load model {given.model!r}{named} ({_first_line(error)})",
                "give a folder with config.json and safetensors, or a hub id such as "
                "'mlx-community/Llama-3.2-3B-Instruct-4bit'",
            )
        if self._start_error is not None:
            self._stop = True
            self.model_provider.reset()
        self._loaded.set()

    def _recover(self, fault: Exception) -> None:
        self.faults += 1
        logging.error(
            "The generation thread met a fault; it goes on without the requests that "
            "it had begun with, and without stored prompts",
            exc_info=fault,
        )
        if self._latest is not None and not self._is_distributed:
            # It waited for a batch to end, which is over now.
            self._latest[0].put_back()
            self.requests.put(self._latest)
        waiting = {request[0] for request, _ in self._waiting}
        begun = [t for t in self.open_tickets() if t.taken and t not in waiting]
        _fail(begun, f"the server met a fault ({_first_line(fault)})")
        self.prompt_cache.forget()
        mx.clear_cache()

    def cut_off(self) -> None:
        """End all requests, since the server does."""
        _fail(self.open_tickets(), "the server is shutting down", status=503)

    def begin_end(self) -> None:
        """Write texts between steps from now on: the server is about to end."""
        self._is_ending = True

    def end(self, by: float) -> bool:
        """Stop the thread, in the middle of a step if that is long.

        Args:
            by: When it has to have ended, `time.monotonic`. Until then it writes what
                is not yet written.

        Returns:
            Whether it has; if not, only the process's end can end it.
        """
        self._end_by, self._stop = by, True
        left = max(0.0, by - time.monotonic()) + _LAST_TEXT
        self._generation_thread.join(min(left, threading.TIMEOUT_MAX))
        return not self._generation_thread.is_alive()

    def _serve_single(self, request: Any, stream: Any) -> None:
        self._ticket = request[0]
        if isinstance(request[0], Ticket) and not self._is_distributed:
            request[0].alone = True
        super()._serve_single(request, stream)

    def _next_request(self, timeout: float | None = None) -> Any:
        # Counting takes a while: not after every step of a batch.
        if timeout or time.monotonic() > self._counted_at + _PAUSE:
            self.kept = len(self.prompt_cache), self.prompt_cache.nbytes
            self._counted_at = time.monotonic()
            if not timeout:
                self.prompt_cache.busy()
        if self._is_ending:
            self.prompt_cache.save_next()
        entry = super()._next_request(timeout)
        # `_tokenize` is not told whose request it has.
        self._ticket = entry[0] if entry is not None else None
        return entry

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """A request's tokens, if all of it can be served.

        Raises:
            RequestError: if it cannot, for the first reason.
        """
        try:
            tokenized = super()._tokenize(tokenizer, request, args)
        except (TurboQuantError, Cancelled):
            raise
        except Exception as error:
            raise RequestError(
                f"the chat template cannot render these messages "
                f"({_first_line(error)})",
                "check roles, contents and tools",
                param="messages",
            ) from error
        prompt = tokenized[0]
        if args.max_tokens == 0:
            raise TokensCounted(len(prompt))
        if self._vocabulary[0] != self.model_provider.model_key:
            size = vocabulary_of(self.model_provider.model)
            self._vocabulary = self.model_provider.model_key, size
        _check_vocabulary(self._vocabulary[1], tokenizer, prompt, args)
        context = context_length(self.model_provider.model)
        if context is not None:
            args.max_tokens = max(1, min(args.max_tokens, context - len(prompt)))
        # Made here, where an error is this request's.
        key = self.model_provider.model_key
        self._make_state_machine(key, tokenizer, args.stop_words)
        host_server._make_sampler(args, tokenizer)
        host_server._make_logits_processors(args)
        if self.admission is not None:
            self.admission.admit(
                self._ticket, self.model_provider, as_tokens(prompt), args.max_tokens
            )
        return tokenized


def _fail(tickets: Iterable[Ticket], reason: str, status: int = 500) -> None:
    for ticket in tickets:
        ticket.put(RequestError(reason, "send it again", status=status))
        ticket.cancel()


def vocabulary_of(network: nn.Module) -> int:
    """How many logits a model gives for each token; nothing is computed for it."""
    return int(network(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])


def _check_vocabulary(size: int, tokenizer: Any, prompt: list[int], args: Any) -> None:
    remedy = f"the model has {size} tokens"
    if args.sampling.top_k >= size:
        raise RequestError(f"top_k is {args.sampling.top_k}", remedy, param="top_k")
    for token in args.logits.logit_bias or ():
        if not 0 <= token < size:
            raise RequestError(
                f"logit_bias is for token {token}", remedy, param="logit_bias"
            )
    largest = max(prompt)
    if largest >= size:
        raise RequestError(f"the prompt has token {largest}", remedy, param="prompt")
    if args.top_logprobs >= size:
        raise RequestError(
            f"top_logprobs is {args.top_logprobs}", remedy, param="top_logprobs"
        )
    for word in args.stop_words:
        if not tokenizer.encode(word, add_special_tokens=False):
            raise RequestError(
                f"stop has {word!r}, of which the tokenizer makes no token",
                "leave it out",
                param="stop",
            )


def _try_template(tokenizer: Any, options: Any) -> None:
    """Render a message, so that a broken template is known at the start."""
    if tokenizer is None or not tokenizer.has_chat_template:
        return
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}],
            add_generation_prompt=True,
            tokenize=True,
            **options.chat_template_args,
        )
    except Exception as error:
        raise UnsupportedModelError(
            f"the chat template cannot be used ({_first_line(error)})",
            "give another with --chat-template",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""`Admission`: which requests fit in the memory that caches may take.

Owns the decision before a prompt is read. It counts what `mlx_tq.plan` counts: the
bytes of a request's caches at its full length, prompt and longest answer. Requests that
run are never ended for it; texts that are only kept for reuse make way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.filesize import decimal

from ..errors import RequestError
from ..memory import Footprint, plain_spec
from .footprint import of_network
from .prompt_store import PromptStore
from .server import Provider
from .tickets import Ticket

#: Seconds after which a refused client is told to ask again.
RETRY_AFTER = 5


class Admission:
    """Lets requests in as long as their caches fit.

    Args:
        budget: Bytes that all caches may take: of requests that run, and of texts kept.
        store: The latter.
        running: Gives the former.
    """

    def __init__(
        self, budget: int, store: PromptStore, running: Callable[[], list[Ticket]]
    ) -> None:
        self.budget = budget
        self._store, self._running = store, running
        self._store_limit = store.max_bytes
        self._key: Any = None
        self._footprint: Footprint | None = None

    def admit(
        self,
        ticket: Ticket,
        provider: Provider,
        prompt_tokens: int,
        max_tokens: int,
        shared_tokens: int = 0,
    ) -> None:
        """Set memory aside for a request, or refuse it.

        Args:
            ticket: The request.
            provider: Has the model loaded.
            prompt_tokens: Tokens of its prompt.
            max_tokens: Tokens of its longest answer.
            shared_tokens: Tokens whose pages a kept text has, which counts them.

        Raises:
            RequestError: 413 if it cannot fit at all, 503 if it does not fit now.
        """
        needed = self.bytes_of(provider, prompt_tokens + max_tokens)
        if needed > self.budget:
            fits = self._tokens_in(provider)
            raise RequestError(
                f"{prompt_tokens} tokens of prompt and {max_tokens} of answer need "
                f"{decimal(needed)} of cache, --kv-memory allows "
                f"{decimal(self.budget)}",
                f"{fits} tokens fit in all: shorten the prompt or lower max_tokens",
                status=413,
                code="kv_memory_exceeded",
            )
        others = sum(one.reserved for one in self._running() if one is not ticket)
        if provider.spec is None and provider.is_batchable:
            # mlx-lm pads the rows of a batch to the longest.
            reserved = [one.reserved for one in self._running() if one.reserved]
            others = max([needed, *reserved]) * (len(reserved) + 1) - needed
        if needed + others > self.budget:
            raise RequestError(
                f"{prompt_tokens} tokens of prompt and {max_tokens} of answer need "
                f"{decimal(needed)} of cache, requests that run leave "
                f"{decimal(self.budget - others)} of {decimal(self.budget)}",
                f"ask again in {RETRY_AFTER} s",
                status=503,
                code="kv_memory_in_use",
                retry_after=RETRY_AFTER,
            )
        if shared_tokens and provider.spec is not None:
            needed = max(0, needed - self.bytes_of(provider, shared_tokens))
        ticket.reserve(needed, self._share_out)
        self._share_out()
        self._store.trim_to(n_bytes=self._store.max_bytes)

    def _share_out(self) -> None:
        """Leave to kept texts what requests do not need.

        A text that is finished is kept only after its request has ended, so it finds
        its own room.
        """
        reserved = sum(one.reserved for one in self._running())
        self._store.max_bytes = min(self._store_limit, self.budget - reserved)

    def bytes_of(self, provider: Provider, tokens: int) -> int:
        """Bytes of the caches of a text of so many tokens."""
        footprint = self._footprint_of(provider)
        return footprint.cache_bytes(tokens, plain_spec(provider.spec))

    def _tokens_in(self, provider: Provider) -> int:
        footprint = self._footprint_of(provider)
        return footprint.tokens_in_cache(self.budget, plain_spec(provider.spec))

    def _footprint_of(self, provider: Provider) -> Footprint:
        if self._footprint is None or self._key != provider.model_key:
            caches = provider.model.make_cache() if provider.spec is not None else None
            entries = getattr(caches, "entries", None)
            self._footprint = of_network(provider.model, entries=entries)
            self._key = provider.model_key
        return self._footprint

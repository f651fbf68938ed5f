"""`Admission`: which requests fit in the memory that caches may take.

Owns the decision before a prompt is read. It counts what `mlx_tq.plan` counts: the
bytes of a request's caches at its full length, prompt and longest answer. Requests that
run are never ended for it; texts that are only kept for reuse make way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from rich.filesize import decimal

from ..conversations.index import Tokens
from ..errors import RequestError, SpecError
from ..memory import Footprint, plain_spec
from ..spec import CacheSpec
from .footprint import of_network
from .prompt_store import PromptStore
from .server import Provider
from .tickets import Ticket

#: A model's footprint, and what its caches store.
_Stored = tuple[Footprint, CacheSpec | None]
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
        store.expected = lambda: sum(one.codes for one in running())
        self._key: Any = None
        self._footprints: list[_Stored] = []

    def check(self, provider: Provider) -> None:
        """Make sure that a text of a page can be served.

        Args:
            provider: Has the model loaded.

        Raises:
            SpecError: if the memory is too small.
        """
        spec = provider.spec
        tokens = 2 if spec is None else spec.sink + spec.window + spec.page
        needed = self.bytes_of(provider, tokens)
        if needed > self.budget:
            raise SpecError(
                f"--kv-memory {decimal(self.budget)} is too small: the caches of "
                f"{tokens} tokens need {decimal(needed)}; mlx_tq.plan --kv-memory says "
                "how many fit in how much"
            )

    def admit(
        self, ticket: Ticket, provider: Provider, prompt: Tokens, max_tokens: int
    ) -> None:
        """Set memory aside for a request, or refuse it.

        Pages that it goes on from are lent: they count as the store's as long as it
        runs, also if their text is dropped meanwhile.

        Args:
            ticket: The request.
            provider: Has the model loaded.
            prompt: Its prompt.
            max_tokens: Tokens of its longest answer.

        Raises:
            RequestError: 413 if it cannot fit at all, 503 if it does not fit now.
        """
        key = provider.model_key
        needed = self.bytes_of(provider, len(prompt) + max_tokens)
        sentence = (
            f"{len(prompt)} tokens of prompt and {max_tokens} of answer need "
            f"{decimal(needed)} of cache, "
        )
        if needed > self.budget:
            fits = self._tokens_in(provider)
            raise RequestError(
                f"{sentence}--kv-memory allows {decimal(self.budget)}",
                f"{fits} tokens fit in all: shorten the prompt or lower max_tokens",
                status=413,
                code="kv_memory_exceeded",
            )
        others = sum(one.reserved for one in self._running() if one is not ticket)
        if provider.spec is None and provider.is_batchable:
            # mlx-lm pads the rows of a batch to the longest.
            reserved = [one.reserved for one in self._running() if one.reserved]
            others = max([needed, *reserved]) * (len(reserved) + 1) - needed
        loans, reach = self._store.loans, self._store.in_reach(key, prompt)
        loans.end_others(self._running())
        shared = min(needed, self._store.lend(ticket, key, prompt))
        others += loans.nbytes - shared
        if needed + others > self.budget:
            loans.end(ticket)
            raise RequestError(
                f"{sentence}requests that run leave "
                f"{decimal(max(0, self.budget - others))} of {decimal(self.budget)}",
                f"ask again in {RETRY_AFTER} s",
                status=503,
                code="kv_memory_in_use",
                retry_after=RETRY_AFTER,
            )
        codes = self._count(Footprint.code_bytes, provider, len(prompt) + max_tokens)
        free = functools.partial(self._free, ticket)
        ticket.reserve(needed - shared, max(0, codes - shared), free)
        self._make_room()
        if self._store.in_reach(key, prompt) < reach:
            # There was no room for the text itself: it is read again.
            loans.end(ticket)
            ticket.reserve(needed, codes, free)
            self._make_room()

    def _free(self, ticket: Ticket) -> None:
        """A request is over: what it borrowed, too."""
        self._store.loans.end(ticket)
        self._share_out()

    def _make_room(self) -> None:
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
        """Bytes of the caches of a text of so many tokens, a draft model's included."""
        return self._count(Footprint.cache_bytes, provider, tokens)

    def _count(self, count: Callable[..., int], provider: Provider, tokens: int) -> int:
        chunk = provider.cli_args.prefill_step_size
        return sum(
            count(footprint, tokens, spec, chunk)
            for footprint, spec in self._footprints_of(provider)
        )

    def _tokens_in(self, provider: Provider) -> int:
        model, _ = self._footprints_of(provider)[0]
        return model.most_tokens(
            lambda tokens: self.bytes_of(provider, tokens), self.budget
        )

    def _footprints_of(self, provider: Provider) -> list[_Stored]:
        """What each model's caches take, and store."""
        if self._key != provider.model_key:
            pairs = [(provider.model, provider.spec)]
            if provider.draft_model is not None:
                pairs.append((provider.draft_model, provider.draft_spec))
            self._footprints = [
                (_footprint_of(network, spec), plain_spec(spec))
                for network, spec in pairs
            ]
            self._key = provider.model_key
        return self._footprints


def _footprint_of(network: nn.Module, spec: CacheSpec | None) -> Footprint:
    caches = network.make_cache() if spec is not None else None
    return of_network(network, entries=getattr(caches, "entries", None))

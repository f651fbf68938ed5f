"""mlx-lm's OpenAI-compatible server, with compressed caches.

What differs: models get our caches when they are loaded, so that continuous batching
stays on; the store of prompts' caches keeps to its byte budget in every path; requests
that cannot be served are refused in words. Routing, batching and streaming are
mlx-lm's.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import mlx_lm.server as host_server
from mlx_lm.models.cache import (
    LRUPromptCache,
    PromptTrie,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)
from rich.filesize import decimal

from ..errors import TurboQuantError, UnsupportedError
from ..spec import CacheSpec
from . import proofs
from .factory import apply
from .loading import cast_for_device, check_context
from .sharing import held_nbytes
from .speculation import check_rewinds, check_split
from .stock import labelled_leaves, length_of

_UNBOUNDED = 1 << 63


class Provider(host_server.ModelProvider):  # type: ignore[misc]
    """Loads models as mlx-lm's server does, and gives them compressed caches.

    Args:
        options: mlx-lm's server options.
        spec: For the model's caches; None leaves them alone.
        draft_spec: For those of a draft model.
        max_kv_size: As for `apply`.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        spec: CacheSpec | None,
        draft_spec: CacheSpec | None = None,
        max_kv_size: int | None = None,
    ) -> None:
        super().__init__(options)
        self.spec, self.draft_spec, self.max_kv_size = spec, draft_spec, max_kv_size

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        super()._load(model_path, adapter_path, draft_model_path)
        try:
            cast_for_device(self.model)
            if self.spec is not None:
                explanation = apply(self.model, self.spec, self.max_kv_size)
                logging.info(f"KV cache: {explanation.summary()}")
            if self.draft_model is not None:
                cast_for_device(self.draft_model)
                if self.draft_spec is not None:
                    apply(self.draft_model, self.draft_spec)
            proofs.wait(logging.info)
            caches = make_prompt_cache(self.model)
            if self.draft_model is not None:
                check_split(self.model, caches)
                check_rewinds(caches, "model")
                check_rewinds(make_prompt_cache(self.draft_model), "draft model")
            self.is_batchable = self.draft_model is None and all(
                hasattr(cache, "merge") for cache in caches
            )
        except TurboQuantError:
            self.reset()  # or the next request would find a half-made model
            raise


class _Texts(PromptTrie):  # type: ignore[misc]
    """mlx-lm's tree of texts, that knows all of its entries.

    Attributes:
        entries: By their id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[int, Any] = {}

    def add(self, model: Any, tokens: list[int], value: Any) -> Any:
        """Put an entry in; returns the one that it replaces, if any."""
        replaced = super().add(model, tokens, value)
        self.entries.pop(id(replaced), None)
        self.entries[id(value)] = value
        return replaced

    def pop(self, model: Any, tokens: list[int]) -> Any:
        """Take an entry out."""
        entry = super().pop(model, tokens)
        self.entries.pop(id(entry), None)
        return entry

    def pop_prefixes(self, model: Any, tokens: list[int]) -> Any:
        """Take out entries of what a text begins with."""
        taken = super().pop_prefixes(model, tokens)
        for _, entry in taken:
            self.entries.pop(id(entry), None)
        return taken


class PromptStore(LRUPromptCache):  # type: ignore[misc]
    """mlx-lm's store of texts' caches, that keeps tokens and caches in step.

    Speculative decoding ends with caches that have not seen the last token, or of two
    models that have seen different numbers: a text that is continued from there would
    miss a token.

    Texts that begin alike hold the same pages: its bytes count them once.
    """

    def __init__(self, *limits: int, **named: int) -> None:
        super().__init__(*limits, **named)
        self._trie = _Texts()

    @property
    def _n_bytes(self) -> int:
        entries = self._trie.entries.values()
        caches = (entry.prompt_cache for entry in entries)
        return held_nbytes(leaf for c in caches for _, leaf in labelled_leaves(c))

    @_n_bytes.setter
    def _n_bytes(self, ignored: int) -> None:
        """mlx-lm adds and takes off what each text would hold alone."""

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **kind: Any
    ) -> None:
        """Keep what all caches have seen of ``tokens``, or nothing if they differ."""
        lengths = [length_of([entry]) for entry in prompt_cache]
        counted = [length for length in lengths if length is not None]
        seen = min([*counted, len(tokens)])
        if any(length != seen for length in counted):
            if not can_trim_prompt_cache(prompt_cache):
                return
            for entry, length in zip(prompt_cache, lengths, strict=True):
                entry.trim((length or seen) - seen)
        super().insert_cache(model, tokens[:seen], prompt_cache, **kind)


class ServedStore(PromptStore):
    """A store whose texts always leave a token to be read, as serving needs."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        """What a text begins with, its last token always left to be read.

        mlx-lm returns all of a text that it has; its server then has nothing to read.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        if not can_trim_prompt_cache(cache):
            return None, tokens
        trim_prompt_cache(cache, 1)
        return cache, tokens[-1:]


class Generator(host_server.ResponseGenerator):  # type: ignore[misc]
    """Serves requests; refuses prompts that the model was not made for."""

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        tokenized = super()._tokenize(tokenizer, request, args)
        prompt = tokenized[0]
        if not prompt:
            raise UnsupportedError("the prompt has no tokens", "send some text")
        check_context(
            self.model_provider.model,
            len(prompt),
            remedy="shorten it or choose a model with a longer context",
        )
        return tokenized

    def _log_cache_stats(self) -> None:
        store = self.prompt_cache
        budget = store.max_bytes
        of = f" of {decimal(budget)}" if budget < _UNBOUNDED else ""
        logging.debug(f"Prompt cache: {len(store)} texts, {decimal(store.nbytes)}{of}")

"""mlx-lm's OpenAI-compatible server, with compressed caches.

What differs: models get our caches when they are loaded, so that continuous batching
stays on; the store of prompts' caches keeps to its byte budget in every path; requests
that cannot be served are refused in words. Routing, batching and streaming are
mlx-lm's.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import mlx_lm.server as host_server
from mlx_lm.models.cache import make_prompt_cache
from rich.filesize import decimal

from ..errors import RequestError, TurboQuantError, UnsupportedError
from ..spec import CacheSpec
from . import proofs
from .chat_template import use_default
from .factory import apply
from .loading import cast_for_device, check_context, load
from .model_folder import check_files
from .prompt_store import UNBOUNDED
from .reading import SharedReading
from .speculation import check_rewinds, check_split
from .stock import keeps_all


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
        self.uses_default_template = options.use_default_chat_template
        own = {"use_default_chat_template": False}
        super().__init__(argparse.Namespace(**{**vars(options), **own}))
        host_server.load = load  # with the checks that all commands make
        self.spec, self.draft_spec, self.max_kv_size = spec, draft_spec, max_kv_size

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        try:
            for path in filter(None, (model_path, adapter_path, draft_model_path)):
                check_files(Path(path), path)
            super()._load(model_path, adapter_path, draft_model_path)
        except UnsupportedError as error:  # requests name what the server listed
            raise RequestError(error.reason, error.remedy, status=500) from error
        try:
            if self.uses_default_template:
                use_default(self.tokenizer)
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
                drafts = make_prompt_cache(self.draft_model)
                check_rewinds(drafts, "draft model")
                caches = [*caches, *drafts]
            self.is_batchable = self.draft_model is None and all(
                hasattr(cache, "merge") for cache in caches
            )
            self.empty_caches = caches
            self.keeps_all = keeps_all(caches)
        except TurboQuantError:
            self.reset()  # or the next request would find a half-made model
            raise


class Generator(SharedReading):
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
        of = f" of {decimal(budget)}" if budget < UNBOUNDED else ""
        logging.debug(f"Prompt cache: {len(store)} texts, {decimal(store.nbytes)}{of}")

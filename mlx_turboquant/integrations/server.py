"""mlx-lm's OpenAI-compatible server, with compressed caches.

What differs: models get our caches when they are loaded, so that continuous batching
stays on; the store of prompts' caches keeps to its byte budget in every path; requests
that cannot be served are refused in words. Routing, batching and streaming are
mlx-lm's.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import signal
import sys
from typing import Any

import mlx.core as mx
import mlx_lm.server as host_server
from mlx_lm.models.cache import make_prompt_cache
from rich.filesize import decimal

from ..conversations.disk import DiskFolder
from ..errors import TurboQuantError, UnsupportedError
from ..spec import CacheSpec
from . import proofs
from .factory import apply
from .loading import cast_for_device, check_context
from .prompt_store import PromptStore
from .reading import SharedReading
from .speculation import check_rewinds, check_split
from .stock import keeps_all, labelled_leaves

#: A request's body at most: some 16 million tokens of text.
MAX_BODY_BYTES = 64 << 20
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
                drafts = make_prompt_cache(self.draft_model)
                check_rewinds(drafts, "draft model")
                caches = [*caches, *drafts]
            self.is_batchable = self.draft_model is None and all(
                hasattr(cache, "merge") for cache in caches
            )
            self.empty_caches = caches
            self.keeps_all = all(keeps_all(leaf) for _, leaf in labelled_leaves(caches))
        except TurboQuantError:
            self.reset()  # or the next request would find a half-made model
            raise


class Generator(SharedReading):
    """Serves requests; refuses prompts that the model was not made for."""

    def _generate(self) -> None:
        try:
            super()._generate()
        finally:
            mx.clear_streams()  # or their threads outlive this one and abort the exit

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
        logging.info(f"Prompt cache: {len(store)} texts, {decimal(store.nbytes)}{of}")


class _ErrorObjects:
    """A handler's output, where mlx-lm's error texts become OpenAI's error objects.

    OpenAI's clients show nothing of a text.
    """

    def __init__(self, handler: Handler, file: Any) -> None:
        self._handler, self._file = handler, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> Any:
        status = self._handler.status
        if status >= 400 and data.startswith(b'{"error": "'):
            kind = "invalid_request_error" if status < 500 else "server_error"
            message = json.loads(data)["error"]
            error = {"message": message, "type": kind, "code": status}
            data = json.dumps({"error": error}).encode()
        return self._file.write(data)


class Handler(host_server.APIHandler):  # type: ignore[misc]
    """Answers requests that mlx-lm's handler would drop or misname."""

    status = 200

    def setup(self) -> None:
        """Reshape errors on their way out."""
        super().setup()
        self.wfile: Any = _ErrorObjects(self, self.wfile)

    def do_POST(self) -> None:
        """Check the body before it is read and decoded."""
        length = self.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._refuse(
                413, f"the body has {length} bytes, at most {MAX_BODY_BYTES} are read"
            )
            return
        if length.startswith("-"):
            self._refuse(400, f"Content-Length {length} is negative")
            return
        if length.isdigit():
            body: bytes = self.rfile.read(int(length))
            try:
                body.decode()
            except UnicodeDecodeError as error:
                self._refuse(400, f"the body is not UTF-8 ({error})")
                return
            self.rfile: Any = io.BytesIO(body)
        try:
            super().do_POST()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            logging.info("A client went away; its request is dropped")

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # mlx-lm says 404 to whatever fails; what we refuse is the request's fault.
        if status_code == 404 and isinstance(sys.exc_info()[1], TurboQuantError):
            status_code = 400
        self.status = status_code
        super()._set_completion_headers(status_code)

    def _refuse(self, status: int, why: str) -> None:
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": why}).encode())


def serve(provider: Provider, folder: DiskFolder | None = None) -> None:
    """Answer requests until interrupted.

    Args:
        provider: Loads the models.
        folder: Where texts go that are idle, and outlive the server.

    Under ``mlx.launch`` every rank calls this; rank 0 answers. SIGTERM stops it as
    Ctrl-C does, which processes in the background may never see.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = provider.cli_args
    budget = options.prompt_cache_bytes
    store = PromptStore(
        options.prompt_cache_size, _UNBOUNDED if budget is None else budget, folder
    )
    generator = Generator(provider, store)
    if mx.distributed.init().rank() == 0:
        host_server._run_http_server(
            options.host, options.port, generator, handler_class=Handler
        )
    else:
        generator.join()

"""``mlx_tq.server``: mlx-lm's OpenAI-compatible server with compressed caches.

Owns the options, mlx-lm's and ours. The serving is ``integrations/server.py``'s.
"""

from __future__ import annotations

import argparse
import logging
from typing import Annotated

import typer

from .. import blas
from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@opt.with_spec
def serve(
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port.")] = 8080,
    allowed_origins: Annotated[
        str, typer.Option(help="Origins that browsers may ask from, with commas.")
    ] = "*",
    draft_model: opt.DraftModel = None,
    num_draft_tokens: opt.NumDraftTokens = 3,
    draft_kv_bits: opt.DraftKvBits = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    log_level: Annotated[
        str, typer.Option(help=f"One of {', '.join(_LEVELS)}.")
    ] = "INFO",
    chat_template: Annotated[
        str, typer.Option(help="A chat template in place of the tokenizer's.")
    ] = "",
    use_default_chat_template: Annotated[
        bool, typer.Option(help="Use the tokenizer class's template if it has none.")
    ] = False,
    chat_template_args: opt.ChatTemplateConfig = None,
    temp: opt.Temp = 0.0,
    top_p: opt.TopP = 1.0,
    top_k: opt.TopK = 0,
    min_p: opt.MinP = 0.0,
    max_tokens: opt.MaxTokens = 512,
    max_kv_size: opt.MaxKvSize = None,
    decode_concurrency: Annotated[
        int, typer.Option(min=1, help="Requests that decode together.")
    ] = 32,
    prompt_concurrency: Annotated[
        int, typer.Option(min=1, help="Prompts that are read together.")
    ] = 8,
    prefill_step_size: opt.PrefillStepSize = 2048,
    prompt_cache_size: Annotated[
        int, typer.Option(min=1, help="Texts whose caches are kept for reuse.")
    ] = 10,
    prompt_cache_bytes: Annotated[
        str | None, typer.Option(help="Bytes they may take, as 4GB.")
    ] = None,
    pipeline: opt.Pipeline = False,
    spec: CacheSpec | None = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does."""
    if log_level.upper() not in _LEVELS:
        raise SpecError(f"--log-level {log_level} is unknown; use {', '.join(_LEVELS)}")
    draft_spec = opt.draft_spec(draft_kv_bits, draft_model)
    if max_kv_size is not None and spec is None:
        raise SpecError(
            "--max-kv-size needs --kv-bits here; add for example --kv-bits 3"
        )
    options = argparse.Namespace(
        model=model,
        adapter_path=adapter_path,
        host=host,
        port=port,
        allowed_origins=allowed_origins.split(","),
        draft_model=draft_model,
        num_draft_tokens=num_draft_tokens,
        trust_remote_code=trust_remote_code,
        chat_template=chat_template,
        use_default_chat_template=use_default_chat_template,
        chat_template_args=opt.json_object("--chat-template-args", chat_template_args),
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_tokens=max_tokens,
        decode_concurrency=decode_concurrency,
        prompt_concurrency=prompt_concurrency,
        prefill_step_size=prefill_step_size,
        prompt_cache_size=prompt_cache_size,
        prompt_cache_bytes=opt.size("--prompt-cache-bytes", prompt_cache_bytes),
        pipeline=pipeline,
        # mlx-lm's own quantization would turn batching off.
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=0,
    )
    blas.prefer_openblas()
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s"
    )

    from mlx_lm.utils import maybe_set_recommended_wired_limit

    from ..integrations import server

    _ = maybe_set_recommended_wired_limit()
    server.serve(server.Provider(options, spec, draft_spec, max_kv_size))

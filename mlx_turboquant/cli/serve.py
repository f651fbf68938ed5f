"""``mlx_tq.server``: models over HTTP, as OpenAI's and Anthropic's APIs are.

Owns the options, mlx-lm's and ours. The serving is ``serving/``'s.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SpecError
from . import kv_folder
from . import options as opt
from .entry import standalone

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def serve(
    context: typer.Context,
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
        str | None,
        typer.Option(
            help="Bytes they may take, as 4GB; 0 for any. Default: a quarter of what "
            "MLX may use."
        ),
    ] = None,
    kv_dir: kv_folder.KvDir = None,
    kv_disk: kv_folder.KvDisk = kv_folder.DISK,
    kv_disk_hourly: kv_folder.KvDiskHourly = kv_folder.HOURLY,
    forget: kv_folder.Forget = False,
    kv_memory: Annotated[
        str | None,
        typer.Option(help="Bytes all caches may take, as 4GB; more is refused."),
    ] = None,
    allow_model: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model that requests may name, MODEL or NAME=MODEL; "
            "default_model is --model. Repeat it for more."
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Ask for this key, or one of several."),
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(help="The same from a file, one on each line.")
    ] = None,
    allowed_hosts: Annotated[
        str,
        typer.Option(
            help="Names that the server may be called by, with commas, beside "
            "localhost, --host and addresses; * for any."
        ),
    ] = "",
    max_body: Annotated[str, typer.Option(help="Bytes a request may have.")] = "64MB",
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests that may wait for their turn.")
    ] = 64,
    request_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds an answer may take; 0 for any.")
    ] = 0.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds running answers get at the end.")
    ] = 30.0,
    pipeline: opt.Pipeline = False,
    kv_bits: opt.KvBits = None,
    kv_codec: opt.KvCodec = None,
    kv_quality: opt.KvQuality = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's and Anthropic's APIs do."""
    if log_level.upper() not in _LEVELS:
        raise SpecError(f"--log-level {log_level} is unknown; use {', '.join(_LEVELS)}")
    spec = opt.cache_spec(kv_bits, kv_codec, kv_quality)
    draft_spec = opt.draft_spec(draft_kv_bits, draft_model)
    if max_kv_size is not None and spec is None:
        raise SpecError(
            "--max-kv-size needs --kv-bits here; add for example --kv-bits 3"
        )
    folder = kv_folder.opened(
        kv_dir, kv_disk, kv_disk_hourly, forget, spec, max_kv_size
    )
    # mlx-lm's server reads its options by name, and they are this command's; those
    # below have another form there.
    options = argparse.Namespace(**context.params)
    options.allowed_origins = allowed_origins.split(",")
    options.chat_template_args = opt.json_object(
        "--chat-template-args", chat_template_args
    )
    # None for what is no number of the user's: mlx-lm's counts what runs, too.
    kept_bytes = opt.size("--prompt-cache-bytes", prompt_cache_bytes)
    options.prompt_cache_bytes = kept_bytes or None
    # Its own quantization, which would turn batching off; ours is in `spec`.
    options.kv_bits = None
    options.kv_group_size, options.quantized_kv_start = 64, 0
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s - %(levelname)s - %(message)s"
    )

    keys = [*(api_key or ()), *_keys_in(api_key_file)]
    if any(not key for key in keys):
        raise SpecError("an --api-key is empty; give it some text")

    from ..extras import need

    packages = ("starlette", "uvicorn", "pydantic", "prometheus_client")
    need("server", "mlx_tq.server", *packages)

    import mlx.core as mx
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    from ..integrations.model_folder import checked_name
    from ..integrations.prompt_store import UNBOUNDED, PromptStore
    from ..integrations.server import Provider
    from ..memory import machine_memory
    from ..serving import guard, names, run, service

    model = opt.DEFAULT_MODEL if model is None else checked_name(model)
    options.model = model
    allowed = names.parse_allowed(allow_model or ())
    names.check_allowed(allowed, model)
    most = opt.size("--max-body", max_body) or 0
    hosts = [host, *filter(None, allowed_hosts.split(","))]
    settings = run.Settings(
        names=names.Names(model, adapter_path, draft_model, allowed),
        host=host,
        port=port,
        access=guard.Access(keys, hosts, options.allowed_origins, most),
        limits=service.Limits(
            max_body=most,
            request_seconds=request_timeout or None,
            max_waiting=max_queue,
        ),
        kv_memory=opt.size("--kv-memory", kv_memory, least=1),
        grace=grace,
    )
    _ = maybe_set_recommended_wired_limit()
    if folder is not None and mx.distributed.init().size() > 1:
        raise SpecError(
            "--kv-dir is for one machine: ranks could find different texts in theirs; "
            "leave it out"
        )
    budget = machine_memory() // 4 if kept_bytes is None else kept_bytes or UNBOUNDED
    store = PromptStore(prompt_cache_size, budget, folder)
    run.serve(Provider(options, spec, draft_spec, max_kv_size), store, settings)


def _keys_in(file: str | None) -> list[str]:
    """Keys of ``--api-key-file``.

    Raises:
        SpecError: if there is no such file, or nothing in it.
    """
    if file is None:
        return []
    try:
        keys = Path(file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--api-key-file {file} cannot be read ({error})") from None
    if not keys:
        raise SpecError(f"--api-key-file {file} is empty; write a key on each line")
    return keys


main = standalone(serve)

"""``mlx_tq.cache_prompt``: read a long prompt once, use it with many questions.

Owns the options and the progress shown; the file is ``integrations/prompt_files.py``'s.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from .. import blas
from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt
from .progress import reading


@opt.with_spec
def cache_prompt(
    prompt_cache_file: Annotated[str, typer.Option(help="The file to write.")],
    prompt: opt.Prompt,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    eos_token: Annotated[
        str | None, typer.Option(help="The tokenizer's end of text.")
    ] = None,
    max_kv_size: opt.MaxKvSize = None,
    prefill_step_size: opt.PrefillStepSize = 2048,
    spec: CacheSpec | None = None,
) -> None:
    """Write the KV cache of a prompt to a file, for mlx_tq.generate."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise SpecError("the prompt is empty; give --prompt some text, or - for stdin")
    blas.prefer_openblas()

    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from ..explanation import explain
    from ..integrations.factory import caches_for
    from ..integrations.loading import check_context, load
    from ..integrations.prompt_files import save_prompt_cache

    tokenizer_config = {"trust_remote_code": trust_remote_code}
    if eos_token is not None:
        tokenizer_config["eos_token"] = eos_token  # type: ignore[assignment]
    name = model or opt.DEFAULT_MODEL
    network, tokenizer = load(
        name,
        adapter_path=adapter_path,
        tokenizer_config=tokenizer_config,
        trust_remote_code=trust_remote_code,
    )
    if tokenizer.has_chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
    else:
        ids = tokenizer.encode(text)
    check_context(network, len(ids))
    cache = caches_for(network, spec, max_kv_size)
    with reading(len(ids)) as report:
        extra = {} if report is None else {"prompt_progress_callback": report}
        for _ in generate_step(
            mx.array(ids),
            network,
            max_tokens=0,
            prompt_cache=cache,
            prefill_step_size=prefill_step_size,
            **extra,
        ):
            pass
    metadata = {"model": name, "tokenizer_config": json.dumps(tokenizer_config)}
    save_prompt_cache(prompt_cache_file, cache, metadata)
    typer.echo(
        f"{len(ids)} tokens, peak memory {mx.get_peak_memory() / 1e9:.3f} GB\n"
        f"KV cache: {explain(cache).summary()}"
    )

"""``mlx_tq.cache_prompt``: read a long prompt once, use it with many questions.

Owns the options and the summary; the file is ``integrations/prompt_files.py``'s.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import options as opt
from .entry import standalone
from .progress import prefill_progress, wait_for_proofs


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
    kv_bits: opt.KvBits = None,
    kv_codec: opt.KvCodec = None,
    kv_quality: opt.KvQuality = None,
    group_size: opt.GroupSize = None,
    quantized_kv_start: opt.QuantizedKvStart = None,
) -> None:
    """Write the KV cache of a prompt to a file, for mlx_tq.generate."""
    opt.refuse_replaced(group_size, quantized_kv_start)
    spec = opt.cache_spec(kv_bits, kv_codec, kv_quality)
    text = opt.prompt_text(prompt)

    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from ..explanation import explain
    from ..integrations.factory import caches_for
    from ..integrations.model_identity import metadata_of
    from ..integrations.prompt_files import checked_target, save_prompt_cache
    from .session import Session

    checked_target(prompt_cache_file)  # now, not when the prompt was read
    session = Session(
        model,
        adapter_path,
        trust_remote_code,
        tokenizer_options={} if eos_token is None else {"eos_token": eos_token},
    )
    use_template = session.tokenizer.has_chat_template
    if use_template:
        text = session.render([{"role": "user", "content": text}], is_open=True)
    tokens = session.encode(text, is_rendered=use_template)
    session.check_context(len(tokens))
    cache = caches_for(session.network, spec, max_kv_size)
    if max_kv_size is None:
        session.warn_if_tight(len(tokens), spec, cache)
    wait_for_proofs()
    with prefill_progress(len(tokens)) as report:
        for _ in generate_step(
            mx.array(tokens),
            session.network,
            max_tokens=0,
            prompt_cache=cache,
            prefill_step_size=prefill_step_size,
            prompt_progress_callback=report,
        ):
            pass
    metadata = {
        **metadata_of(session.name, session.adapter_path),
        "tokenizer_config": json.dumps(session.tokenizer_options),
    }
    save_prompt_cache(prompt_cache_file, cache, metadata)
    typer.echo(
        f"{len(tokens)} tokens, peak memory {mx.get_peak_memory() / 1e9:.3f} GB\n"
        f"KV cache: {explain(cache).summary()}"
    )


main = standalone(cache_prompt)

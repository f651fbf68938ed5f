"""``mlx_tq.generate``: mlx-lm's generate with a compressed cache.

Owns the order of things the user sees: text as it comes, then speed and bytes.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from .. import blas
from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt
from .plan import warn_if_tight
from .progress import reading

if TYPE_CHECKING:
    import mlx.nn as nn


@opt.with_spec
def generate(
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    extra_eos_token: opt.ExtraEosToken = None,
    system_prompt: opt.SystemPrompt = None,
    prompt: opt.Prompt = "hello",
    prefill_response: opt.PrefillResponse = None,
    max_tokens: opt.MaxTokens = 100,
    temp: opt.Temp = 0.0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    top_k: opt.TopK = 0,
    xtc_probability: opt.XtcProbability = 0.0,
    xtc_threshold: opt.XtcThreshold = 0.1,
    min_tokens_to_keep: opt.MinTokensToKeep = 1,
    seed: opt.Seed = None,
    ignore_chat_template: opt.IgnoreChatTemplate = False,
    chat_template_config: opt.ChatTemplateConfig = None,
    verbose: opt.Verbose = "True",
    max_kv_size: opt.MaxKvSize = None,
    prefill_step_size: opt.PrefillStepSize = 2048,
    prompt_cache_file: opt.PromptCacheFile = None,
    draft_model: opt.DraftModel = None,
    num_draft_tokens: opt.NumDraftTokens = 3,
    draft_kv_bits: opt.DraftKvBits = None,
    spec: CacheSpec | None = None,
) -> None:
    """Generate text with a compressed KV cache."""
    draft_spec = opt.draft_spec(draft_kv_bits, draft_model)
    template = opt.json_object("--chat-template-config", chat_template_config)
    text = prompt.replace("\\n", "\n").replace("\\t", "\t")
    text = sys.stdin.read() if prompt == "-" else text
    if not text and prefill_response is None:
        raise SpecError("the prompt is empty; give --prompt some text, or - for stdin")
    blas.prefer_openblas()

    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from ..explanation import explain
    from ..integrations.footprint import of_network
    from ..integrations.loading import check_context, load
    from ..integrations.stock import length_of

    if seed is not None:
        mx.random.seed(seed)
    loud = verbose.lower() not in ("false", "f")
    name, tokenizer_config, stored = _read_cache_file(prompt_cache_file, model)
    name = name or opt.DEFAULT_MODEL
    network, tokenizer = load(
        name,
        adapter_path=adapter_path,
        tokenizer_config={**tokenizer_config, "trust_remote_code": trust_remote_code},
        trust_remote_code=trust_remote_code,
    )
    if loud and mx.default_device().type == mx.DeviceType.cpu:
        typer.echo("On the CPU: weights are loaded as float32.", err=True)
    for token in extra_eos_token or ():
        tokenizer.add_eos_token(token)
    ids = _encode(
        tokenizer,
        text,
        None if ignore_chat_template else system_prompt,
        prefill_response,
        use_template=not ignore_chat_template and tokenizer.has_chat_template,
        continues=stored is not None,
        template=template,
    )
    cache = _make_cache(network, spec, max_kv_size, stored)
    if loud and max_kv_size is None:
        warn_if_tight(of_network(network), len(ids) + max_tokens, spec)
    check_context(network, (length_of(cache) or 0) + len(ids))
    draft, all_caches = _add_draft(
        draft_model, draft_spec, tokenizer, cache, len(ids) + max_tokens
    )
    sampler = make_sampler(
        temp,
        top_p,
        min_p,
        min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )
    extra: dict[str, Any] = {}
    if draft is not None:
        extra["num_draft_tokens"] = num_draft_tokens
    drafted = 0
    with reading(len(ids), wanted=loud and draft is None) as report:
        if report is not None:
            extra["prompt_progress_callback"] = report
        for response in stream_generate(
            network,
            tokenizer,
            ids,
            max_tokens=max_tokens,
            draft_model=draft,
            sampler=sampler,
            prompt_cache=all_caches,
            prefill_step_size=prefill_step_size,
            **extra,
        ):
            typer.echo(response.text, nl=False)
            drafted += response.from_draft
    typer.echo()
    if loud:
        _print_statistics(response, explain(cache))
        if draft is not None:
            share = 100 * drafted / response.generation_tokens
            typer.echo(f"Drafted: {share:.1f}% of the tokens")


def _read_cache_file(
    path: str | None, model: str | None
) -> tuple[str | None, dict[str, Any], list[Any] | None]:
    """Model name, tokenizer options and layer caches, from the file if there is one."""
    if path is None:
        return model, {}, None
    from ..integrations.prompt_files import load_prompt_cache

    stored, metadata = load_prompt_cache(path, return_metadata=True)
    made_by = metadata.get("model")
    if model is not None and made_by is not None and model != made_by:
        raise SpecError(
            f"{path} was made with model {made_by!r}, not {model!r}; "
            "leave --model out, or make the cache again"
        )
    return made_by or model, json.loads(metadata.get("tokenizer_config", "{}")), stored


def _encode(
    tokenizer: Any,
    text: str,
    system_prompt: str | None,
    prefill: str | None,
    use_template: bool,
    continues: bool,
    template: dict[str, Any],
) -> list[int]:
    """Tokens of the prompt, inside the chat template if there is one."""
    if use_template:
        messages = [{"role": "user", "content": text}]
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        if prefill is not None:
            messages.append({"role": "assistant", "content": prefill})
        ends = {
            "tokenize": False,
            "continue_final_message": prefill is not None,
            "add_generation_prompt": prefill is None,
            **template,
        }
        rendered = tokenizer.apply_chat_template(messages, **ends)
        # With a stored prefix, only what follows the opening of this turn is new.
        text = rendered[rendered.index(text) :] if continues else rendered
    ids = list(tokenizer.encode(text, add_special_tokens=not use_template))
    if not ids:
        raise SpecError("the prompt has no tokens; give --prompt some text")
    return ids


def _make_cache(
    network: nn.Module,
    spec: CacheSpec | None,
    max_kv_size: int | None,
    stored: list[Any] | None,
) -> list[Any]:
    from ..cache import TurboQuantCache
    from ..integrations.factory import caches_for
    from ..integrations.prompt_files import check_cache

    if stored is not None:
        check_cache(network, stored, "the prompt cache")
        held = {c.spec for c in stored if isinstance(c, TurboQuantCache)}
        if spec is not None and not spec.adaptive and held != {spec}:
            raise SpecError(
                f"--kv-bits asks for {spec}, but the prompt cache holds "
                f"{', '.join(map(str, held)) or 'no compressed layer'}; "
                "leave --kv-bits out"
            )
        return stored
    return caches_for(network, spec, max_kv_size)


def _add_draft(
    name: str | None,
    spec: CacheSpec | None,
    tokenizer: Any,
    cache: list[Any],
    tokens: int,
) -> tuple[Any, list[Any]]:
    """The draft model, and the caches of both models as mlx-lm wants them."""
    if name is None:
        return None, cache
    from ..integrations.factory import caches_for
    from ..integrations.loading import load
    from ..integrations.speculation import PairedCaches, check_rewinds
    from ..integrations.stock import length_of

    draft, draft_tokenizer = load(name)
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise SpecError(
            f"draft model {name!r} has {draft_tokenizer.vocab_size} tokens, the model "
            f"{tokenizer.vocab_size}; choose a draft model of the same family"
        )
    held = length_of(cache)
    if held:
        raise SpecError(
            f"the prompt cache holds {held} tokens that the draft model has not seen; "
            "leave --draft-model or --prompt-cache-file out"
        )
    draft_cache = caches_for(draft, spec)
    check_rewinds(cache, "model", tokens)
    check_rewinds(draft_cache, "draft model", tokens)
    return draft, PairedCaches(cache, draft_cache)


def _print_statistics(response: Any, explanation: Any) -> None:
    rule = "=" * 10
    typer.echo(
        f"{rule}\n"
        f"Prompt: {response.prompt_tokens} tokens, "
        f"{response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB\n"
        f"KV cache: {explanation.summary()}"
    )
    for row in explanation.left_alone if explanation.packed_layers else ():
        typer.echo(f"  layer {row.layer} stays {row.cache}: {row.reason}")

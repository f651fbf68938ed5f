"""``mlx_tq.generate``: mlx-lm's generate with a compressed cache.

Owns the order of things the user sees: text as it comes, then speed and bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt
from .entry import standalone
from .progress import prefill_progress, wait_for_proofs

if TYPE_CHECKING:
    from ..explanation import Explanation
    from .session import Session


def generate(
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    extra_eos_token: opt.ExtraEosToken = None,
    system_prompt: opt.SystemPrompt = None,
    prompt: opt.Prompt = "hello",
    image: opt.Image = None,
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
    use_default_chat_template: opt.UseDefaultChatTemplate = False,
    chat_template_config: opt.ChatTemplateConfig = None,
    verbose: opt.Verbose = "True",
    max_kv_size: opt.MaxKvSize = None,
    prefill_step_size: opt.PrefillStepSize = 2048,
    prompt_cache_file: opt.PromptCacheFile = None,
    draft_model: opt.DraftModel = None,
    num_draft_tokens: opt.NumDraftTokens = 3,
    draft_kv_bits: opt.DraftKvBits = None,
    quantize_activations: opt.QuantizeActivations = False,
    kv_bits: opt.KvBits = None,
    kv_codec: opt.KvCodec = None,
    kv_quality: opt.KvQuality = None,
    group_size: opt.GroupSize = None,
    quantized_kv_start: opt.QuantizedKvStart = None,
) -> None:
    """Generate text with a compressed KV cache."""
    opt.refuse_replaced(group_size, quantized_kv_start)
    spec = opt.cache_spec(kv_bits, kv_codec, kv_quality)
    draft_spec = opt.draft_spec(draft_kv_bits, draft_model)
    template_options = opt.template_options(
        "--chat-template-config", chat_template_config
    )
    text = opt.prompt_text(
        prompt.replace("\\n", "\n").replace("\\t", "\t"),
        may_be_empty=prefill_response is not None,
    )
    opt.checked_text("--system-prompt", system_prompt or "")
    opt.checked_text("--prefill-response", prefill_response or "")

    from mlx_lm import stream_generate

    from ..explanation import explain
    from ..integrations.compiled_step import compiled
    from ..integrations.stock import length_of
    from ..integrations.vision_loop import has_no_other, open_image
    from .pictures import PictureSession, refuse_options
    from .session import Session

    # Of a model's text part mlx-lm's loop knows more; images are mlx-vlm's alone.
    is_pictured = bool(image) or (model is not None and has_no_other(model))
    if is_pictured:
        refuse_options(
            draft_model=draft_model is not None,
            prefill_response=prefill_response is not None,
            prompt_cache_file=prompt_cache_file is not None,
            quantize_activations=quantize_activations,
        )
    images = [open_image(source) for source in image or ()]
    tokenizer_options: dict[str, Any] = {}
    stored_cache: list[Any] | None = None
    if prompt_cache_file is not None:
        model, tokenizer_options, stored_cache = _read_cache_file(
            prompt_cache_file, model, adapter_path
        )
    session = (PictureSession if is_pictured else Session)(
        model,
        adapter_path,
        trust_remote_code,
        tokenizer_options=tokenizer_options,
        extra_eos_tokens=extra_eos_token or (),
        template_options=template_options,
        use_default_template=use_default_chat_template,
        quantize_activations=quantize_activations,
        seed=seed,
        is_verbose=verbose.lower() not in ("false", "f"),
    )
    if isinstance(session, PictureSession):
        inputs = session.inputs(text, images, system_prompt, ignore_chat_template)
        tokens = inputs.tokens
    elif session.tokenizer.has_chat_template and not ignore_chat_template:
        tokens = _encode_chat(
            session, text, system_prompt, prefill_response, stored_cache is not None
        )
    else:
        tokens = session.encode(text)
    cache = _make_cache(session, spec, max_kv_size, stored_cache)
    seen = (length_of(cache) or 0) + len(tokens)
    session.check_context(seen)
    wanted, max_tokens = max_tokens, session.tokens_left(seen, max_tokens)
    if max_kv_size is None:
        session.warn_if_tight(len(tokens) + max_tokens, spec, cache)
    draft, all_caches = None, cache
    if draft_model is not None:
        draft, all_caches = _add_draft(
            session, draft_model, draft_spec, cache, len(tokens) + max_tokens
        )
    wait_for_proofs(session.is_verbose)
    sampler = session.sampler(
        temp=temp,
        top_p=top_p,
        min_p=min_p,
        min_tokens_to_keep=min_tokens_to_keep,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
    )
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampler": sampler,
        "prompt_cache": all_caches,
        "prefill_step_size": prefill_step_size,
    }
    drafted_tokens = 0
    # Neither mlx-lm's drafted prefill nor mlx-vlm's loop says how far it is.
    has_bar = session.is_verbose and draft is None and not is_pictured
    with prefill_progress(len(tokens), has_bar) as report:
        if isinstance(session, PictureSession):
            responses = session.stream(inputs, **options)
        else:
            # A step that verifies drafted tokens is another one each time.
            network = (
                session.network if draft is not None else compiled(session.network)
            )
            responses = stream_generate(
                network,
                session.tokenizer,
                tokens,
                draft_model=draft,
                prompt_progress_callback=report,
                num_draft_tokens=num_draft_tokens,  # dropped without a draft model
                **options,
            )
        for response in responses:
            typer.echo(response.text, nl=False)
            drafted_tokens += getattr(response, "from_draft", False)
    typer.echo()
    if response.generation_tokens == max_tokens < wanted and session.is_verbose:
        typer.echo(f"stopped at the end of the context, {seen + max_tokens}", err=True)
    if session.is_verbose:
        _print_statistics(response, explain(cache))
        if draft is not None:
            share = 100 * drafted_tokens / response.generation_tokens
            typer.echo(f"Drafted: {share:.1f}% of the tokens")


def _read_cache_file(
    path: str, model: str | None, adapter_path: str | None
) -> tuple[str | None, dict[str, Any], list[Any]]:
    """Model name, tokenizer options and layer caches of a saved prompt.

    Raises:
        FormatError: if the file cannot be read.
        SpecError: if another model made it.
    """
    from ..integrations.model_folder import checked_name
    from ..integrations.model_identity import is_same
    from ..integrations.prompt_files import load_prompt_cache

    cache, metadata = load_prompt_cache(path, return_metadata=True)
    made_by = metadata.get("model")
    named = made_by or opt.DEFAULT_MODEL if model is None else checked_name(model)
    if not is_same(metadata, named, adapter_path):
        raise SpecError(
            f"{path} was made with model {made_by!r}, not {named!r} as it is here; "
            "name that model (and its --adapter-path), or make the cache again"
        )
    options = opt.json_object(
        f"the tokenizer_config in {path}", metadata.get("tokenizer_config")
    )
    # All that is ever written there; the rest could load anything.
    return named, {k: v for k, v in options.items() if k == "eos_token"}, cache


def _encode_chat(
    session: Session,
    text: str,
    system_prompt: str | None,
    prefill_response: str | None,
    follows_stored_prompt: bool,
) -> list[int]:
    """Tokens of the prompt inside the chat template."""
    messages = [{"role": "user", "content": text}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    if prefill_response is not None:
        messages.append({"role": "assistant", "content": prefill_response})
    is_open = prefill_response is not None
    if follows_stored_prompt:  # the opening of this turn is in the stored cache
        rendered = session.render_turn(messages, is_open)
    else:
        rendered = session.render(messages, is_open)
    return session.encode(rendered, is_rendered=True)


def _make_cache(
    session: Session,
    spec: CacheSpec | None,
    max_kv_size: int | None,
    stored: list[Any] | None,
) -> list[Any]:
    """The stored cache if there is one, once it is sure to fit; else an empty one.

    Raises:
        SpecError: if the stored cache has another spec or size than was asked for.
        UnsupportedModelError: if the model cannot use such caches.
    """
    from ..cache import TurboQuantCache
    from ..integrations.factory import caches_for
    from ..integrations.prompt_files import check_cache
    from ..integrations.stock import keeps_all, labelled_leaves

    if stored is None:
        return caches_for(session.network, spec, max_kv_size)
    check_cache(session.network, stored, "the prompt cache")
    stored_specs = {c.spec for c in stored if isinstance(c, TurboQuantCache)}
    if spec is not None and stored_specs != {spec}:
        raise SpecError(
            f"--kv-bits asks for {spec}, but the prompt cache holds "
            f"{', '.join(sorted(map(str, stored_specs))) or 'no compressed layer'}; "
            "leave --kv-bits out"
        )
    leaves = [leaf for _, leaf in labelled_leaves(stored)]
    sizes = {getattr(leaf, "max_size", None) for leaf in leaves}
    if max_kv_size is not None and (
        max_kv_size not in sizes or any(keeps_all([leaf]) for leaf in leaves)
    ):
        raise SpecError(
            f"--max-kv-size {max_kv_size} is for a new cache, and the prompt cache was "
            "made without it; leave it out, or make the file with it "
            f"(mlx_tq.cache_prompt --max-kv-size {max_kv_size})"
        )
    return stored


def _add_draft(
    session: Session,
    name: str,
    spec: CacheSpec | None,
    cache: list[Any],
    tokens: int,
) -> tuple[Any, list[Any]]:
    """The draft model, and the caches of both models as mlx-lm wants them.

    Raises:
        SpecError: if the draft model has another vocabulary, or has not seen what a
            stored cache holds.
        UnsupportedError: if a cache cannot take rejected tokens back.
    """
    from ..integrations.factory import caches_for
    from ..integrations.loading import load
    from ..integrations.speculation import PairedCaches, check_rewinds
    from ..integrations.stock import length_of

    draft, draft_tokenizer = load(name)
    vocabulary = session.tokenizer.vocab_size
    if draft_tokenizer.vocab_size != vocabulary:
        raise SpecError(
            f"draft model {name!r} has {draft_tokenizer.vocab_size} tokens, the model "
            f"{vocabulary}; choose a draft model of the same family"
        )
    stored_tokens = length_of(cache)
    if stored_tokens:
        raise SpecError(
            f"the prompt cache holds {stored_tokens} tokens that the draft model has "
            "not seen; leave --draft-model or --prompt-cache-file out"
        )
    draft_cache = caches_for(draft, spec)
    check_rewinds(cache, "model", tokens)
    check_rewinds(draft_cache, "draft model", tokens)
    return draft, PairedCaches(cache, draft_cache)


def _print_statistics(response: Any, explanation: Explanation) -> None:
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
    if explanation.uncompiled:
        typer.echo(f"  steps are not compiled: {explanation.uncompiled}")
    for row in explanation.left_alone if explanation.packed_layers else ():
        typer.echo(f"  layer {row.layer} stays {row.cache}: {row.reason}")


main = standalone(generate)

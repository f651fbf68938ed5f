"""``mlx_tq.chat``: long chats on a laptop.

Owns what is asked and shown: the prompt with its context meter, commands, streaming.
The chat itself is ``integrations/conversation.py``'s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import SpecError, TurboQuantError
from . import options as opt
from .entry import standalone
from .progress import wait_for_proofs

if TYPE_CHECKING:
    from rich.console import Console

    from ..integrations.conversation import Conversation

_HELP = """\
/stats       what the cache stores, layer by layer
/save FILE   write chat and cache to a file
/load FILE   go on from one
/reset       start over
/help        this
/quit        leave (so does an end of input)
Ctrl-C stops an answer."""


def chat(
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    system_prompt: opt.SystemPrompt = None,
    chat_template_config: opt.ChatTemplateConfig = None,
    temp: opt.Temp = 0.0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    top_k: opt.TopK = 0,
    xtc_probability: opt.XtcProbability = 0.0,
    xtc_threshold: opt.XtcThreshold = 0.1,
    seed: opt.Seed = None,
    max_kv_size: opt.MaxKvSize = None,
    prefill_step_size: opt.PrefillStepSize = 2048,
    max_tokens: opt.MaxTokens = 256,
    pipeline: opt.Pipeline = False,
    kv_bits: opt.KvBits = None,
    kv_codec: opt.KvCodec = None,
    kv_quality: opt.KvQuality = None,
) -> None:
    """Chat with a model, its KV cache compressed."""
    spec = opt.cache_spec(kv_bits, kv_codec, kv_quality)
    template_options = opt.template_options(
        "--chat-template-config", chat_template_config
    )
    opt.checked_text("--system-prompt", system_prompt or "")

    import mlx.core as mx

    if pipeline or mx.distributed.init().size() > 1:
        raise SpecError(
            "a chat is for one machine; use mlx_tq.server on several (--pipeline too)"
        )

    from rich.console import Console

    from ..integrations.conversation import Conversation
    from ..integrations.factory import caches_for
    from .session import Session

    session = Session(
        model,
        adapter_path,
        trust_remote_code,
        template_options=template_options,
        seed=seed,
    )

    def make_cache() -> list[Any]:
        return caches_for(session.network, spec, max_kv_size)

    conversation = Conversation(
        session.network,
        session.tokenizer,
        make_cache,
        system_prompt,
        session.name,
        session.template_options,
        session.adapter_path,
    )
    if conversation.context is not None and max_kv_size is None:
        session.warn_if_tight(conversation.context, spec, conversation.cache)
    wait_for_proofs()
    console = Console(highlight=False)
    console.print(session.name, style="bold", end="  ", markup=False)
    console.print("/help says what else you can type.")
    sampler = session.sampler(
        temp=temp,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
    )
    answer_options = {
        "max_tokens": max_tokens,
        "prefill_step_size": prefill_step_size,
        "sampler": sampler,
    }
    for line in _read_turns(console, conversation):
        try:
            if line in ("/quit", "/q"):
                break
            if line.startswith("/"):
                _run_command(console, conversation, line)
            elif opt.checked_text("what you typed", line):
                _answer(console, conversation, line, answer_options)
        except TurboQuantError as error:
            line = " ".join(str(error).splitlines())
            console.print(f"error: {line}", style="red", soft_wrap=True, markup=False)


def _read_turns(console: Console, conversation: Conversation) -> Iterator[str]:
    """What the user types, until there is no more; asks only at a terminal."""
    if sys.stdin is not None and sys.stdin.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives the prompt a history)
    while True:
        try:
            meter = f"\n[dim]{_meter(conversation)}[/]\n[bold green]>>>[/] "
            console.print(meter, end="")
            line = _typed()
        except KeyboardInterrupt:
            continue
        if line is None:
            console.print()
            return
        yield line


def _typed() -> str | None:
    """A line, or None if there is no more."""
    try:
        return input().strip()
    except (EOFError, RuntimeError):  # of a closed stdin
        return None


def _meter(conversation: Conversation) -> str:
    """How full the context is, and what it takes: ``812 / 8192 tokens, 2.1 MB``."""
    from rich.filesize import decimal

    summary = conversation.explain()
    limit = "" if conversation.context is None else f" / {conversation.context}"
    meter = f"{conversation.tokens}{limit} tokens, {decimal(summary.nbytes)}"
    if summary.has_codes:
        meter += f" ({decimal(summary.fp16_nbytes)} in fp16)"
    return meter


def _run_command(console: Console, conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command in ("/save", "/load") and not argument:
        console.print(f"{command} needs a file, as in {command} chat.safetensors")
    elif command == "/save":
        conversation.save(argument)
        console.print(f"saved {conversation.tokens} tokens")
    elif command == "/load":
        conversation.load(argument)
        console.print(f"loaded {conversation.tokens} tokens")
        for message in conversation.messages[-2:]:
            console.print(f"{message['role']}: {message['content']}", markup=False)
    elif command == "/stats":
        console.print(str(conversation.explain()), markup=False, soft_wrap=True)
    elif command in ("/reset", "/r"):
        conversation.reset()
        console.print("started over")
    else:
        if command not in ("/help", "/h"):
            console.print(f"{command} is no command", markup=False)
        console.print(_HELP, markup=False)


def _answer(
    console: Console, conversation: Conversation, text: str, options: dict[str, Any]
) -> None:
    answer = conversation.say(text, **options)
    last = None
    try:
        for last in answer:
            console.print(last.text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        answer.close()
    console.print()
    if last is not None:
        console.print(
            f"[dim]{last.prompt_tokens} tokens read at {last.prompt_tps:.0f}/s, "
            f"{last.generation_tokens} written at {last.generation_tps:.1f}/s[/]"
        )


main = standalone(chat)

"""``mlx_tq.chat``: long chats on a laptop.

Owns what is asked and shown: the prompt with its context meter, commands, streaming.
The chat itself is ``integrations/conversation.py``'s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import blas
from ..errors import TurboQuantError
from ..spec import CacheSpec
from . import options as opt
from .plan import warn_if_tight

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


@opt.with_spec
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
    spec: CacheSpec | None = None,
) -> None:
    """Chat with a model, its KV cache compressed."""
    template = opt.json_object("--chat-template-config", chat_template_config)
    blas.prefer_openblas()

    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler
    from rich.console import Console

    from ..integrations.conversation import Conversation
    from ..integrations.factory import caches_for
    from ..integrations.footprint import of_network
    from ..integrations.loading import load

    if seed is not None:
        mx.random.seed(seed)
    name = model or opt.DEFAULT_MODEL
    network, tokenizer = load(
        name,
        adapter_path=adapter_path,
        tokenizer_config={"trust_remote_code": trust_remote_code},
        trust_remote_code=trust_remote_code,
    )

    def make_cache() -> list[Any]:
        return caches_for(network, spec, max_kv_size)

    talk = Conversation(network, tokenizer, make_cache, system_prompt, name, template)
    console = Console(highlight=False)
    if talk.context is not None and max_kv_size is None:
        warn_if_tight(of_network(network), talk.context, spec)
    console.print(f"[bold]{name}[/]  /help says what else you can type.")
    options = {
        "max_tokens": max_tokens,
        "prefill_step_size": prefill_step_size,
        "sampler": make_sampler(
            temp,
            top_p,
            min_p,
            top_k=top_k,
            xtc_probability=xtc_probability,
            xtc_threshold=xtc_threshold,
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        ),
    }
    for line in _lines(console, talk):
        try:
            if line in ("/quit", "/q"):
                break
            if line.startswith("/"):
                _obey(console, talk, line)
            elif line:
                _answer(console, talk, line, options)
        except TurboQuantError as error:
            console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)


def _lines(console: Console, talk: Conversation) -> Iterator[str]:
    """What the user types, until there is no more; asks only at a terminal."""
    if sys.stdin.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives the prompt a history)
    while True:
        try:
            meter = f"\n[dim]{_meter(talk)}[/]\n[bold green]>>>[/] "
            console.print(meter, end="")
            yield input().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            console.print()
            return


def _meter(talk: Conversation) -> str:
    """How full the context is, and what it takes: ``812 / 8192 tokens, 2.1 MB``."""
    from rich.filesize import decimal

    told = talk.explain()
    of = "" if talk.context is None else f" / {talk.context}"
    meter = f"{talk.tokens}{of} tokens, {decimal(told.nbytes)}"
    if told.packed_layers and talk.tokens:
        meter += f" ({decimal(told.fp16_nbytes)} in fp16)"
    return meter


def _obey(console: Console, talk: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command in ("/save", "/load") and not argument:
        console.print(f"{command} needs a file, as in {command} chat.safetensors")
    elif command == "/save":
        talk.save(argument)
        console.print(f"saved {talk.tokens} tokens")
    elif command == "/load":
        talk.load(argument)
        console.print(f"loaded {talk.tokens} tokens")
        for message in talk.messages[-2:]:
            console.print(f"{message['role']}: {message['content']}", markup=False)
    elif command == "/stats":
        console.print(str(talk.explain()), markup=False, soft_wrap=True)
    elif command in ("/reset", "/r"):
        talk.reset()
        console.print("started over")
    else:
        if command not in ("/help", "/h"):
            console.print(f"{command} is no command", markup=False)
        console.print(_HELP, markup=False)


def _answer(
    console: Console, talk: Conversation, text: str, options: dict[str, Any]
) -> None:
    answer = talk.say(text, **options)
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

"""``mlx_tq.chat``: long chats on a laptop.

Owns what is asked and shown: the prompt with its context meter, commands, streaming.
The chat itself is ``integrations/conversation.py``'s.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import SpecError, TurboQuantError, UnsupportedError
from . import kv_folder
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
/undo        take the last turn back
/system TEXT another system prompt; without TEXT none
/reset       start over
/help        this
/quit        leave (so does an end of input)
r, h and q are the last three, as in mlx-lm. Ctrl-C stops an answer."""
#: mlx-lm's commands.
_SHORT = {"r": "/reset", "h": "/help", "q": "/quit"}


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
    kv_dir: kv_folder.KvDir = None,
    kv_disk: kv_folder.KvDisk = kv_folder.DISK,
    kv_disk_hourly: kv_folder.KvDiskHourly = kv_folder.HOURLY,
    forget: kv_folder.Forget = False,
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
    folder = kv_folder.opened(
        kv_dir, kv_disk, kv_disk_hourly, forget, spec, max_kv_size
    )

    import mlx.core as mx

    if pipeline or mx.distributed.init().size() > 1:
        raise SpecError(
            "a chat is for one machine; use mlx_tq.server on several (--pipeline too)"
        )

    from rich.console import Console

    from ..integrations.conversation import Conversation
    from ..integrations.factory import caches_for
    from ..integrations.prompt_store import PromptStore
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
        PromptStore(max_size=1, folder=folder),
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
    try:
        _talk(console, conversation, answer_options, ends_by_signal=folder is not None)
    finally:
        conversation.store.close()


def _talk(
    console: Console,
    conversation: Conversation,
    answer_options: dict[str, Any],
    ends_by_signal: bool,
) -> None:
    with _signals_that_end() if ends_by_signal else contextlib.nullcontext():
        for line in _read_turns(console, conversation):
            line = _SHORT.get(line.removeprefix("/"), line)
            try:
                if line == "/quit":
                    break
                if line.startswith("/"):
                    _run_command(console, conversation, line)
                elif opt.checked_text("what you typed", line):
                    _answer(console, conversation, line, answer_options)
            except TurboQuantError as error:
                line = " ".join(str(error).splitlines())
                console.print(
                    f"error: {line}", style="red", soft_wrap=True, markup=False
                )


@contextlib.contextmanager
def _signals_that_end() -> Iterator[None]:
    """Let a closed window end the chat as /quit does: with all of it written."""

    def end(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, n, None) for n in ("SIGTERM", "SIGHUP")]
    # nohup ignores one of them, and means it.
    usual = [n for n in numbers if n and signal.getsignal(n) is signal.SIG_DFL]
    for number in usual:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in usual:
            signal.signal(number, signal.SIG_DFL)


def _read_turns(console: Console, conversation: Conversation) -> Iterator[str]:
    """What the user types, until there is no more; asks only at a terminal."""
    if sys.stdin is not None and sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives the prompt a history)
    while True:
        try:
            meter = f"\n[dim]{_meter(conversation)}[/]\n[bold green]>>>[/] "
            console.print(meter, end="")
            conversation.store.write()  # while the user thinks
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
    from rich.filesize import decimal

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
        if not conversation.has_own_bits:
            console.print(
                "its cache keeps the bits it was saved with until /reset, and stays "
                "out of --kv-dir"
            )
        for message in conversation.messages[-2:]:
            console.print(f"{message['role']}: {message['content']}", markup=False)
    elif command == "/stats":
        console.print(str(conversation.explain()), markup=False, soft_wrap=True)
        kept = decimal(conversation.store.nbytes)
        console.print(f"with what is kept to go back to: {kept}")
    elif command == "/undo":
        said = conversation.undo()
        console.print(f"taken back: {said}", markup=False, soft_wrap=True)
    elif command == "/system":
        conversation.change_system(opt.checked_text("what you typed", argument) or None)
        console.print("from the next turn on")
    elif command == "/reset":
        conversation.reset()
        console.print("started over")
    else:
        if command != "/help":
            console.print(f"{command} is no command", markup=False)
        console.print(_HELP, markup=False)


def _answer(
    console: Console, conversation: Conversation, text: str, options: dict[str, Any]
) -> None:
    answer, before = conversation.say(text, **options), conversation.messages
    last = None
    try:
        for last in _spoken(answer):
            console.print(last.text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        answer.close()
    finally:
        console.print()
    if conversation.messages is before:
        console.print("[dim]stopped before the answer began; the turn is not kept[/]")
    elif last is not None:
        console.print(
            f"[dim]{conversation.cached_tokens} tokens reused, "
            f"{last.prompt_tokens} read at {last.prompt_tps:.0f}/s, "
            f"{last.generation_tokens} written at {last.generation_tps:.1f}/s[/]"
        )


def _spoken(answer: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The same answer; what ends it too early is an error that says what became of it.

    Raises:
        UnsupportedError: for errors of any kind.
    """
    try:
        yield from answer
    except TurboQuantError as error:
        raise UnsupportedError(str(error), "the turn is not kept") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"the answer failed ({type(error).__name__}: {reason})",
            "the turn is not kept, and the chat is as before; say it again, shorter if "
            "memory was short",
        ) from error


main = standalone(chat)

"""An agent's session, and what a restart costs: tokens read, bytes written, seconds.

    session   the transcript of tests/agents.py (34 requests: tools, thinking that is
              cut, a header that changes twice, two sub-agents at once) put to mlx-lm's
              server with its own store and caches, and to ours. `new` are the tokens
              that no earlier prompt or answer of the session began with, `read` what
              the server read. Answers are the models' own: both differ a little
    written   bytes in the folder after the session, every text's pages written when its
              answer was done and all of it at the end, over the bytes that the store
              held then, pages that texts share counted once
    restart   a prompt of N tokens of the books that a server has not read, and the same
              and a question more to one that has, or that finds it in the folder:
              seconds to the first token, files in the system's page cache
    killed    a server process, killed (-9) once its pages were written, and one that
              was not: what it reads and says when it is asked the next question

    python benchmarks/bench_agents.py [--tokens 7000] [--only session|restart|killed]

Tiny models are random (tests/tiny_models.py), with pages of 32 tokens; the books' model
is the bundled one, k3v3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_turboquant.blas import prefer_openblas

prefer_openblas()
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# isort: split
import agents  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx_lm.server as host  # noqa: E402
from mlx_lm.models.cache import LRUPromptCache  # noqa: E402
from serving_tools import options  # noqa: E402

from mlx_turboquant.conversations.disk import DiskFolder  # noqa: E402
from mlx_turboquant.evals import text as books_text  # noqa: E402
from mlx_turboquant.integrations import prompt_store, server  # noqa: E402
from mlx_turboquant.integrations.loading import cast_for_device  # noqa: E402
from mlx_turboquant.integrations.prompt_store import PromptStore  # noqa: E402
from mlx_turboquant.spec import CacheSpec  # noqa: E402

TINY = CacheSpec.parse("k4v4,page=32,window=8")
BOOKS = CacheSpec.parse("k3v3")
TEXTS = 40


class StockProvider(host.ModelProvider):  # type: ignore[misc]
    """mlx-lm's, with float32 weights on a CPU."""

    def _load(self, *paths: Any, **named: Any) -> None:
        super()._load(*paths, **named)
        cast_for_device(self.model)


@contextlib.contextmanager
def serving(
    path: Path, spec: CacheSpec | None, folder: Path | None = None
) -> Iterator[Any]:
    """A generator; mlx-lm's own without a spec."""
    given = options(
        model=str(path), chat_template=agents.TEMPLATE, prefill_step_size=2048
    )
    if spec is None:
        made = host.ResponseGenerator(StockProvider(given), LRUPromptCache(TEXTS))
    else:
        kept = None if folder is None else DiskFolder(folder, 10**10)
        store = PromptStore(TEXTS, folder=kept)
        made = server.Generator(server.Provider(given, spec), store)
    while made.model_provider.model is None:
        time.sleep(0.05)
    try:
        yield made
    finally:
        made.stop_and_join()


class Slow(agents.Session):
    """A session of somebody who thinks, so that the server is idle in between."""

    def ask(self, *request: Any) -> str:
        """As of a `Session`, a little later."""
        answer: str = super().ask(*request)
        time.sleep(0.3)
        return answer


def session(name: str, path: Path, spec: CacheSpec, folder: Path) -> None:
    """One model's rows."""
    for label, own in (("mlx-lm", None), ("ours", spec)):
        prompt_store.PAGES_AFTER = 0.0
        with serving(path, own, folder) as generator:
            asked, store = Slow(generator), generator.prompt_cache
            begun = time.perf_counter()
            agents.play(asked)
            seconds = time.perf_counter() - begun
            held, tokens = store.nbytes, sum(asked.new) + 8 * len(asked.new)
        row = (
            f"session, {name}, {label}: {len(asked.read)} requests, read "
            f"{sum(asked.read)}, new {sum(asked.new)}, ratio {asked.ratio:.3f}, "
            f"{seconds:.1f} s"
        )
        if own is not None:
            kept = DiskFolder(folder, 10**10)
            row += (
                f"; written {kept.nbytes}, held {held}, ratio "
                f"{kept.nbytes / held:.3f}, {kept.nbytes / tokens:.0f} bytes a token"
            )
            kept.close()
        print(row, flush=True)


def ask(generator: Any, prompt: str, count: int = 16) -> tuple[float, int, str]:
    """Seconds to the first token, tokens read, and the answer."""
    request = host.CompletionRequest("text", prompt, [], None, None)
    begun = time.perf_counter()
    ctx, answers = generator.generate(request, agents.arguments(count))
    texts = [next(answers).text]
    first = time.perf_counter() - begun
    texts += [answer.text for answer in answers]
    return first, len(ctx.prompt) - ctx.prompt_cache_count, "".join(texts)


def restart(tokens: int, folder: Path, repeats: int = 5) -> None:
    """Seconds to the first token, with and without the folder."""
    with serving(agents.MODEL, BOOKS) as generator:
        tokenizer = generator.model_provider.tokenizer
        words = "\n".join(books_text.books())
        prompt = tokenizer.decode(tokenizer.encode(words)[:tokens])
        question = prompt + " So he said"
        fresh = [ask(generator, f"{i} {question}") for i in range(2)]
        fresh.append(ask(generator, prompt))
        kept = ask(generator, question)
    with serving(agents.MODEL, BOOKS, folder) as generator:
        ask(generator, prompt)
        cache = generator.prompt_cache.nbytes
    written = DiskFolder(folder, 10**10)
    size = written.nbytes
    written.close()
    restored = []
    for _ in range(repeats):
        copied = folder.with_name("copy")
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(folder, copied)
        with serving(agents.MODEL, BOOKS, copied) as generator:
            ask(generator, "Hello", 2)  # a model's first step compiles
            restored.append(ask(generator, question))
    whole = statistics.median(first for first, _, _ in fresh)
    again = statistics.median(first for first, _, _ in restored)
    same = "the same" if restored[0][2] == kept[2] else "DIFFERENT"
    print(
        f"restart, books-20m k3v3, {tokens} tokens: first token after {whole:.3f} s "
        f"(reads {fresh[0][1]}), from memory {kept[0]:.3f} s (reads {kept[1]}), from "
        f"the folder {again:.3f} s (reads {restored[0][1]}): {again / whole:.2%}; "
        f"written {size}, cache {cache}, ratio {size / cache:.3f}; answers are {same} "
        "as without it",
        flush=True,
    )


def killed(folder: Path) -> None:
    """What a killed server's successor reads and says."""
    prompt = "\n".join(books_text.books())[:8000]
    answers = {}
    for kill in (False, True):
        first = Process(folder if kill else None)
        said = first.complete(prompt)
        if kill:
            time.sleep(4)  # PAGES_AFTER, and some
            first.kill()
            first = Process(folder)
        question = f"{prompt}{said['choices'][0]['text']} And then"
        answer = first.complete(question)
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        answers[kill] = answer["choices"][0]["text"]
        print(
            f"killed, books-20m k3v3, {'-9' if kill else 'not'}: {cached} of "
            f"{usage['prompt_tokens']} tokens cached",
            flush=True,
        )
        first.kill()
    same = "the same" if answers[False] == answers[True] else "DIFFERENT"
    print(f"killed: the answers are {same}", flush=True)


class Process:
    """``mlx_tq.server`` in a process of its own."""

    def __init__(self, folder: Path | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        own = ["--kv-dir", str(folder)] if folder else []
        command = [sys.executable, "-m", "mlx_turboquant", "server", "--kv-bits", "3"]
        command += ["--model", str(agents.MODEL), "--port", str(self.port), *own]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").close()
                return
            time.sleep(0.1)
        raise SystemExit("the server does not answer")

    def complete(self, prompt: str) -> Any:
        """The answer to a text."""
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)

    def kill(self) -> None:
        """As the system does when memory is short."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--only", choices=("session", "restart", "killed"))
    chosen = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"mlx {mx.__version__} on {mx.default_device()}, {platform.platform()}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if chosen.only in (None, "session"):
            for name in agents.MODELS:
                path = agents.save_tiny(name, place / name)
                session(name, path, TINY, place / f"kv {name}")
            session("books-20m", agents.MODEL, BOOKS, place / "kv books")
        if chosen.only in (None, "restart"):
            restart(chosen.tokens, place / "kv restart")
        if chosen.only in (None, "killed"):
            killed(place / "kv killed")


if __name__ == "__main__":
    main()

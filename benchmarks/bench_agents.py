"""An agent's session, and what a restart costs: tokens read, bytes written, seconds.

All of it over HTTP, with servers in processes of their own: `mlx_tq.server`, with and
without --kv-memory, and mlx-lm's, all with OpenBLAS.

    session   the transcript of tests/agents.py (34 requests: tools, thinking that is
              cut, a header that changes twice, two sub-agents at once). `new` are the
              tokens that no earlier prompt or answer of the session began with, `read`
              those that `usage` does not call cached. A logit_bias makes every answer
              the same few words, so that all servers get the same requests; mlx-lm's
              three times, since what it reads again depends on a race
    written   the same with --kv-dir and a pause after each answer in which the server
              writes: bytes in the folder after it has ended, over those of one cache of
              as many tokens as the session's texts have that no other begins with; of
              these bytes, what is behind texts' last pages: recurrent states, windows
    restart   a prompt of N tokens of the books that a server has not read, and the same
              and a question more to one that has, or that finds it in the folder:
              seconds to the first token, files in the system's page cache
    killed    a server, killed (-9) once it was idle for 4 s, and one that was not: what
              it reads and says when it is asked the next question

    python benchmarks/bench_agents.py [--tokens 7000] [--only session|written|...]

Tiny models are random (tests/tiny_models.py), with pages of 32 tokens; the books' model
is the bundled one with float32 weights, as a CPU wants them, k3v3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
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
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import load_tokenizer  # noqa: E402

import mlx_turboquant as tq  # noqa: E402
from mlx_turboquant.conversations.index import as_tokens, common_length  # noqa: E402
from mlx_turboquant.evals import text as books_text  # noqa: E402
from mlx_turboquant.memory import CHUNK  # noqa: E402

TINY, BOOKS = "k4v4,page=32,window=8", "k3v3"
#: Models of `agents.MODELS` whose sessions are told.
NAMES = (
    *("llama", "sliding window", "gpt_oss", "hybrid", "hybrid (mamba)"),
    *("jamba", "granitemoehybrid", "nemotron_h"),
)
WRITTEN = ("llama", "sliding window", "hybrid", "hybrid (mamba)")
#: mlx-lm's server, with the BLAS that ours loads: MLX's own is several times slower.
STOCK = """
from mlx_turboquant.blas import prefer_openblas
prefer_openblas()
from mlx_lm.server import main
main()
"""
TEXTS, ANSWER = "40", 8
#: The kind of records that are behind pages (integrations/saved_texts.py).
TAIL = 3
#: What all answers say, again and again: as a text it has the same tokens.
WORD = "right"


class Server:
    """A server in a process of its own.

    Args:
        path: The model.
        spec: For `mlx_tq.server`; mlx-lm's without.
        options: More of the command's.
    """

    def __init__(self, path: Path, spec: str | None, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._at = f"http://127.0.0.1:{probe.getsockname()[1]}"
        ours = ["-m", "mlx_turboquant", "server", "--kv-bits", str(spec)]
        command = [sys.executable, *(ours if spec else ["-c", STOCK])]
        command += ["--model", str(path), "--port", self._at.rpartition(":")[2]]
        command += ["--prompt-cache-size", TEXTS, *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, cwd=ROOT, **quiet)
        for _ in range(600):
            with contextlib.suppress(OSError):
                self.get("/health")
                break
            time.sleep(0.1)
        else:
            raise SystemExit("the server does not answer")
        # A model's first steps compile.
        self.ask({"prompt": "Hello", "max_tokens": 3}, "/v1/completions")

    def get(self, path: str) -> str:
        """A page."""
        with urllib.request.urlopen(self._at + path) as answer:
            return str(answer.read().decode())

    def ask(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> Answer:
        """An answer, asked for again as long as there is no room for it."""
        body = {"temperature": 0, "stream": True, **body}
        body["stream_options"] = {"include_usage": True}
        asked = urllib.request.Request(
            self._at + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        begun, answer = time.perf_counter(), Answer()
        while True:
            try:
                with urllib.request.urlopen(asked) as lines:
                    answer.read(lines, begun)
                return answer
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise SystemExit(error.read().decode()) from error
                answer.refusals += 1
                time.sleep(float(error.headers["Retry-After"]))

    def end(self, how: int = signal.SIGTERM) -> None:
        """As the system does."""
        self._process.send_signal(how)
        self._process.wait()


class Answer:
    """A streamed answer.

    Attributes:
        first: Seconds to its first token, refusals before it included.
        text: What it says.
        prompt, cached: Tokens of the prompt, and those that were cached.
        refusals: How often there was no room for it.
    """

    def __init__(self) -> None:
        self.first, self.text = 0.0, ""
        self.prompt = self.cached = self.refusals = 0

    def read(self, lines: Any, begun: float) -> None:
        """Read a stream of events."""
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                self.first = self.first or time.perf_counter() - begun
                said = choice.get("text") or choice.get("delta", {}).get("content")
                self.text += said or ""
            if event.get("usage"):
                usage = event["usage"]
                self.prompt = usage["prompt_tokens"]
                self.cached = usage["prompt_tokens_details"]["cached_tokens"]

    @property
    def missed(self) -> int:
        """Tokens of the prompt that were read."""
        return self.prompt - self.cached


@contextlib.contextmanager
def serving(path: Path, spec: str | None, *options: str) -> Iterator[Server]:
    """A server, ended in the end."""
    server = Server(path, spec, *options)
    try:
        yield server
    finally:
        server.end()


class Session:
    """As `agents.Session`, of somebody who waits a little after each answer."""

    def __init__(self, server: Server, path: Path, pause: float) -> None:
        self._server, self._pause = server, pause
        self._tokenizer: Any = load_tokenizer(path)
        (self._word,) = self._tokenizer.encode(WORD, add_special_tokens=False)
        self._seen: list[Any] = []
        self._lock = threading.Lock()
        self.answers: list[Answer] = []
        self.new = 0

    def ask(self, messages: list[Any]) -> str:
        """The answer's text."""
        prompt = as_tokens(
            self._tokenizer.apply_chat_template(
                messages, tools=agents.TOOLS, add_generation_prompt=True
            )
        )
        with self._lock:
            common = max((common_length(prompt, s) for s in self._seen), default=0)
            self.new += max(1, len(prompt) - common)
            answer = as_tokens([*prompt.tolist(), *[self._word] * ANSWER])
            self._seen.append(answer)
        body = {"messages": messages, "tools": agents.TOOLS, "max_tokens": ANSWER}
        said = self._server.ask({**body, "logit_bias": {str(self._word): 100}})
        if (said.prompt, said.text) != (len(prompt), WORD * ANSWER):
            raise SystemExit(f"{said.prompt} tokens, not {len(prompt)}: {said.text!r}")
        self.answers.append(said)
        time.sleep(self._pause)
        return said.text


def play(server: Server, path: Path, pause: float = 0.1) -> tuple[Session, str]:
    """A session, and what is to be said of it."""
    session = Session(server, path, pause)
    agents.play(session)
    read = sum(one.missed for one in session.answers)
    refused = sum(one.refusals for one in session.answers)
    return session, (
        f"{len(session.answers)} requests, read {read}, new {session.new}, ratio "
        f"{read / session.new:.2f}{f', refused {refused} times' if refused else ''}"
    )


def session(name: str, path: Path, spec: str) -> None:
    """One model's rows: mlx-lm's, ours, and ours in little memory."""
    for run in range(1, 4):  # which of two sub-agents is read first is chance
        with serving(path, None) as server:
            row = play(server, path)[1]
        print(f"session, {name}, mlx-lm, run {run}: {row}", flush=True)
    with serving(path, spec) as server:
        played, row = play(server, path)
        print(f"session, {name}, ours: {row}", flush=True)
    most = max(one.prompt for one in played.answers) + ANSWER
    needed = tq.footprint(str(path)).cache_bytes(most, tq.CacheSpec.parse(spec), CHUNK)
    for times in 3, 1.5:  # what the longest request may need
        room = f"{times * needed / 1e6:.2f}MB"
        with serving(path, spec, "--kv-memory", room) as server:
            row = play(server, path)[1]
        label = f"ours --kv-memory {room} ({times} of the longest)"
        print(f"session, {name}, {label}: {row}", flush=True)


def written(name: str, path: Path, spec: str, folder: Path) -> None:
    """What a session leaves in a folder."""
    with serving(path, spec, "--kv-dir", str(folder)) as server:
        played, _ = play(server, path, pause=2.6)
    tokens = played.new + ANSWER * len(played.answers)
    needed = tq.footprint(str(path)).cache_bytes(tokens, tq.CacheSpec.parse(spec), 1)
    size = sum(file.stat().st_size for file in folder.glob("*.kv"))
    with sqlite3.connect(folder / "index.sqlite") as index:
        ask = "SELECT kind, sum(size) FROM records GROUP BY kind"
        ends = dict(index.execute(ask).fetchall()).get(TAIL, 0)
    index.close()
    print(
        f"written, {name}: {size} bytes, the cache of {tokens} tokens {needed}, ratio "
        f"{size / needed:.2f}: {(size - ends) / needed:.2f} of pages, "
        f"{ends / needed:.2f} behind them; {size / tokens:.0f} bytes a token",
        flush=True,
    )


def asked(server: Server, prompt: str, count: int = 16) -> Answer:
    """The answer to a text."""
    return server.ask({"prompt": prompt, "max_tokens": count}, "/v1/completions")


def restart(path: Path, tokens: int, folder: Path, repeats: int = 3) -> None:
    """Seconds to the first token, with and without the folder."""
    tokenizer: Any = load_tokenizer(path)
    words = "\n".join(books_text.books())
    prompt = tokenizer.decode(tokenizer.encode(words)[:tokens])
    question = prompt + " So he said"
    restored, kept = [], {}
    for label, spec in (("mlx-lm", None), ("ours", BOOKS)):
        with serving(path, spec) as server:
            fresh = [asked(server, f"{i} {question}") for i in range(2)]
            fresh.append(asked(server, prompt))
            kept[label] = asked(server, question)
        whole = statistics.median(one.first for one in fresh)
        print(
            f"restart, books-20m, {label}, {tokens} tokens: first token after "
            f"{whole:.3f} s (reads {fresh[0].missed}), from memory "
            f"{kept[label].first:.3f} s (reads {kept[label].missed})",
            flush=True,
        )
    with serving(path, BOOKS, "--kv-dir", str(folder)) as server:
        asked(server, prompt)
        found = re.search(r"^mlx_tq_cache_bytes (\S+)", server.get("/metrics"), re.M)
    size = sum(file.stat().st_size for file in folder.glob("*.kv"))
    cache = float(found[1]) if found else 0.0
    for _ in range(repeats):
        copied = folder.with_name("copy")
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(folder, copied)
        with serving(path, BOOKS, "--kv-dir", str(copied)) as server:
            restored.append(asked(server, question))
    again = statistics.median(one.first for one in restored)
    same = "the same" if restored[0].text == kept["ours"].text else "DIFFERENT"
    print(
        f"restart, books-20m, ours, {tokens} tokens: from the folder {again:.3f} s "
        f"(reads {restored[0].missed}): {again / whole:.2%}; written {size}, cache "
        f"{cache:.0f}, ratio {size / cache:.3f}; answers are {same} as without it",
        flush=True,
    )


def killed(name: str, path: Path, spec: str, folder: Path) -> None:
    """What a killed server's successor reads and says."""
    prompt, answers = "\n".join(books_text.books())[:16_000], {}
    for kill in (False, True):
        options = ["--kv-dir", str(folder)] if kill else []
        server = Server(path, spec, *options)
        said = asked(server, prompt)
        if kill:
            time.sleep(4)
            server.end(signal.SIGKILL)
            server = Server(path, spec, *options)
        answers[kill] = asked(server, f"{prompt}{said.text} And then")
        server.end(signal.SIGKILL)
        print(
            f"killed, {name}, {'-9' if kill else 'not'}: {answers[kill].cached} of "
            f"{answers[kill].prompt} tokens cached",
            flush=True,
        )
    same = "the same" if answers[False].text == answers[True].text else "DIFFERENT"
    print(f"killed, {name}: the answers are {same}", flush=True)


def with_template(folder: Path) -> Path:
    """A model's folder that has the session's chat template."""
    (folder / "chat_template.jinja").write_text(agents.TEMPLATE)
    return folder


def books(folder: Path) -> Path:
    """Save the bundled model with float32 weights."""
    network, _ = tq.load(str(agents.MODEL))
    config = json.loads((agents.MODEL / "config.json").read_text())
    for name in ("quantization", "quantization_config", "torch_dtype"):
        config.pop(name, None)
    folder.mkdir()
    weights: Any = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    for file in agents.MODEL.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return folder


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=7000)
    kinds = ("session", "written", "restart", "killed")
    parser.add_argument("--only", choices=kinds)
    parser.add_argument("--models", nargs="*", default=[*NAMES, "books-20m"])
    chosen = parser.parse_args()
    todo = [chosen.only] if chosen.only else kinds
    print(f"mlx {mx.__version__} on {mx.default_device()}, {platform.platform()}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name in chosen.models:
            is_tiny = name != "books-20m"
            spec = TINY if is_tiny else BOOKS
            made = agents.save_tiny if is_tiny else lambda _, folder: books(folder)
            path = with_template(made(name, place / name))
            if "session" in todo:
                session(name, path, spec)
            if "written" in todo and name in WRITTEN:
                written(name, path, spec, place / f"kv {name}")
            if "killed" in todo and name in ("hybrid", "books-20m"):
                killed(name, path, spec, place / f"killed {name}")
            if "restart" in todo and name == "books-20m":
                restart(path, chosen.tokens, place / "kv restart")


if __name__ == "__main__":
    main()

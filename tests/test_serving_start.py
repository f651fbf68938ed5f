"""A server as a process: starts that fail, the end, the log."""

import json
import logging
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import MODEL
from serving_tools import LIMIT, until

from mlx_turboquant.cli import serve as cli_serve
from mlx_turboquant.memory import machine_memory
from mlx_turboquant.serving import run
from mlx_turboquant.serving.run import SaidOnce

COMMAND = [sys.executable, "-m", "mlx_turboquant", "server", "--model", str(MODEL)]


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield str(other.getsockname()[1])


#: Options, and what the one line says.
FAILURES = {
    "port": (["--port", "TAKEN"], "choose another --port"),
    "host": (["--host", "no.such.host.invalid"], "is unknown"),
    "model": (["--model", "/no/such"], "cannot load model '/no/such'"),
    "draft": (["--draft-model", "/no/such"], "cannot load model '/no/such'"),
    "template": (["--chat-template", "{% if"], "chat template cannot be used"),
    "render": (["--chat-template", "{{ a.b }}"], "'a' is undefined"),
    "keys": (["--api-key-file", "/no/such"], "--api-key-file /no/such"),
    "alias": (["--allow-model", "a="], "use NAME=MODEL"),
    "list": (["--allow-model", "a=/no/such"], "--allow-model 'a': cannot load model"),
    "name": (["--allow-model", "a=b c"], "--allow-model 'a': cannot load model 'b c'"),
    "nothing": (["--kv-bits", "3", "--kv-memory", "0"], "outside 1..1e18 bytes"),
    "little": (
        ["--kv-bits", "3", "--kv-memory", "1KB", "--log-level", "WARNING"],
        "164 tokens need",
    ),
    "plain": (["--kv-memory", "1KB"], "--kv-memory 1.0 kB is too small"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_server_that_cannot_start_says_why_in_one_line(run_cli, taken, case):
    options, says = FAILURES[case]
    options = [taken if option == "TAKEN" else option for option in options]
    if "--port" not in options:
        options = [*options, "--port", "0"]
    code, _, err = run_cli("server", "--model", str(MODEL), *options)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_what_is_kept_takes_a_quarter_unless_it_is_said(monkeypatch):
    """0 is any number, as it is without the option in mlx-lm."""
    memory, given = machine_memory(), []

    def serve(provider, store, settings):
        given.append((store.max_bytes, provider.cli_args.prompt_cache_bytes))

    monkeypatch.setattr(run, "serve", serve)
    for options in (), ("--prompt-cache-bytes", "1MB"), ("--prompt-cache-bytes", "0"):
        with pytest.raises(SystemExit) as ended:
            cli_serve.main([*options, "--model", str(MODEL)])
        assert ended.value.code == 0
    assert given == [(memory // 4, None), (10**6, 10**6), (1 << 63, None)]


def test_warnings_of_mlx_lms_server_are_said_once():
    said = SaidOnce()
    for path, count in (("/lib/mlx_lm/server.py", 1), ("/lib/other.py", 3)):
        record = logging.LogRecord("root", 30, path, 1, "no tools", (), None)
        assert sum(said.filter(record) for _ in range(3)) == count


class Process:
    """A server in a process of its own."""

    def __init__(self, *options):
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", *options], stderr=subprocess.PIPE, text=True
        )
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if "Listening on" in line:
                break
        self.url = self.log[-1].split()[-1]

    def ask(self, **fields):
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(fields).encode()
        )
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return answer.read().decode()

    def runs(self, count):
        """Whether so many requests are read or answered."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=LIMIT) as answer:
            return f"\nmlx_tq_requests_running {count}.0\n" in answer.read().decode()

    def end(self, sign):
        self.process.send_signal(sign)
        started = time.monotonic()
        _, rest = self.process.communicate(timeout=LIMIT)
        self.log += rest.splitlines(keepends=True)
        return self.process.returncode, time.monotonic() - started


def test_sigterm_lets_answers_finish_and_the_log_is_quiet():
    made = Process("--kv-bits", "4")
    for _ in range(3):
        made.ask(prompt="The sea " * 60, max_tokens=30)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(made.ask, prompt="The", max_tokens=150, stream=True)
        until(lambda: made.runs(1))
        code, _ = made.end(signal.SIGTERM)
        text = answer.result()
    assert code == 0
    assert '"finish_reason": "length"' in text
    assert text.endswith("data: [DONE]\n\n")
    # A line for the caches, for the address, and one for each answer.
    assert len(made.log) == 6, made.log
    with pytest.raises(urllib.error.URLError):
        made.ask(prompt="The")


def test_answers_that_take_longer_than_the_grace_are_told_so():
    made = Process("--grace", "1")
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(made.ask, prompt="The", max_tokens=8000, stream=True)
        whole = pool.submit(made.ask, prompt="The", max_tokens=8000)
        until(lambda: made.runs(2))
        code, seconds = made.end(signal.SIGINT)
        error = whole.exception()
    assert code == 0
    assert seconds < 25, "a second of grace, and some to end"
    assert "the server is shutting down" in stream.result().splitlines()[-2]
    assert error.code == 503
    assert "Traceback" not in "".join(made.log)
    error.close()

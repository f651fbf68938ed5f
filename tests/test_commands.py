"""chat, cache_prompt, plan and server as users run them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers import MODEL, ROOT

from mlx_turboquant.cli import options
from mlx_turboquant.errors import SpecError

MODEL = str(MODEL)
NEEDLE = (ROOT / "examples" / "needle.txt").read_text()


def test_a_chat_from_end_to_end(run_cli, tmp_path):
    file = tmp_path / "talk"
    lines = [
        "The old man looked at the sea and",
        "/stats",
        f"/save {file}",
        "/reset",
        f"/load {file}",
        " then he",
        f"/load {tmp_path / 'none'}",
        "/save",
        "/dance",
        "/quit",
        "never read",
    ]
    code, out, err = run_cli(
        "chat", "--model", MODEL, "--kv-bits", "3", "-m", "12",
        stdin="\n".join(lines),
    )  # fmt: skip
    assert code == 0, err
    meters = [int(n) for n in re.findall(r"^(\d+) / 8192 tokens, ", out, re.M)]
    assert meters[0] == 0
    assert meters[1] == meters[2] == meters[3] > 12
    assert meters[4] == 0  # after /reset
    assert meters[5] == meters[1]  # after /load
    assert meters[6] > meters[5] + 12
    assert "k3v3 in 8 of 8 layers" in out
    statistics = r"\d+ tokens reused, \d+ read at \d+/s, 12 written at [\d.]+/s"
    assert len(re.findall(statistics, out)) == 2
    assert "error: cannot read a prompt cache" in out
    assert "/save needs a file" in out
    assert "/dance is no command" in out
    assert "user: The old man looked at the sea and" in out
    assert file.with_suffix(".safetensors").exists()


def test_a_cached_prompt_is_used_by_generate(run_cli, tmp_path):
    text, question = NEEDLE.split("\n\nQuestion")
    file = str(tmp_path / "book")
    code, out, err = run_cli(
        "cache_prompt", "--model", MODEL, "--kv-bits", "4",
        "--prompt-cache-file", file, "-p", "-", stdin=text,
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"^1\d{3} tokens, peak memory", out)
    assert "k4v4 in 8 of 8 layers" in out
    code, out, err = run_cli(
        "generate", "--prompt-cache-file", file, "-m", "8", "-p",
        "\n\nQuestion" + question,
    )  # fmt: skip
    assert code == 0, err
    assert "48213" in out
    assert re.search(r"Prompt: \d{1,2} tokens", out)


def test_a_plan(run_cli):
    code, out, err = run_cli("plan", "--model", MODEL, "--memory", "0.096GB", "3", "2")
    assert code == 0, err
    rows = dict(re.findall(r"^(fp32|k\dv\d) +(\d+) ", out, re.M))
    peaks = [float(mb) for mb in re.findall(r"([\d.]+) MB(?: +[\d.]+)?$", out, re.M)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3
    fits = [int(rows[name]) for name in ("fp32", "k3v3", "k2v2")]
    assert fits == sorted(fits)
    assert 0 < fits[0] < fits[1] < 8192


def test_generate_warns_before_memory_runs_out(run_cli, monkeypatch):
    """On a machine that says it has 120 MB."""
    code = (
        "import sys; from mlx_turboquant import memory;"
        "from mlx_turboquant.cli import app;"
        "memory.machine_memory = lambda: 120_000_000;"
        "sys.argv = ['mlx_tq', *sys.argv[1:]]; app.main()"
    )
    run = [sys.executable, "-c", code, "generate", "--model", MODEL, "-p", "hello"]
    done = subprocess.run([*run, "-m", "4"], capture_output=True, text=True)
    assert "warning" not in done.stderr
    text = "word " * 1500
    done = subprocess.run(
        [*run[:-1], text, "-m", "4"], capture_output=True, text=True, check=True
    )
    assert re.search(
        r"warning: 150\d tokens need .* --kv-bits 3 holds \d{4}", done.stderr
    )


BAD = {
    "plan auto": (["plan", "auto", "--model", MODEL], "are chosen from the text"),
    "plan evict": (["plan", "3,evict=score", "--model", MODEL], "leave evict out"),
    "generate evict": (
        ["generate", "--model", MODEL, "--kv-bits", "3,evict=score"],
        "give max_kv_size",
    ),
    "plan size": (["plan", "--model", MODEL, "--memory", "big"], "'big' is no size"),
    "chat bits": (["chat", "--model", MODEL, "--kv-bits", "9"], "outside 1..8"),
    "cache empty": (["cache_prompt", "--prompt-cache-file", "x", "-p", ""], "empty"),
    "server level": (["server", "--model", MODEL, "--log-level", "x"], "unknown"),
    "server draft": (["server", "--model", MODEL, "--draft-kv-bits", "3"], "needs"),
    "server size": (
        ["server", "--model", MODEL, "--prompt-cache-bytes", "4XB"],
        "'4XB' is no size",
    ),
    "draft bits": (
        ["generate", "--model", MODEL, "--draft-kv-bits", "3"],
        "--draft-kv-bits needs --draft-model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run_cli, case):
    args, says = BAD[case]
    code, _, err = run_cli(*args)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert says in lines[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("1.5 G", 1_500_000_000), ("7", 7), ("2kb", 2000)],
)
def test_sizes(text, count):
    assert options.size("--memory", text) == count


@pytest.mark.parametrize("text", ["", "GB", "-", "1QB", "1.2.3MB"])
def test_what_is_no_size(text):
    with pytest.raises(SpecError, match="is no size"):
        options.size("--memory", text)


def test_drafts_are_reported(run_cli):
    code, out, err = run_cli(
        "generate", "--model", MODEL, "--draft-model", MODEL, "--kv-bits", "3",
        "--draft-kv-bits", "2", "-p", "Once upon a time", "-m", "20",
    )  # fmt: skip
    assert code == 0, err
    share = float(re.search(r"Drafted: ([\d.]+)% of the tokens", out)[1])
    assert 50 < share <= 75  # 3 of 4 at most


def test_the_server_serves_and_stops_when_asked():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_turboquant", "server", "--model", MODEL,
         "--kv-bits", "3", "--port", str(port), "--prompt-cache-bytes", "1GB"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 5}).encode()
        with urllib.request.urlopen(f"{url}/v1/completions", body, 60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "k3v3 in 8 of 8 layers" in log
    assert "Traceback" not in log

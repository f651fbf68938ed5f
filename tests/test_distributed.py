"""Several machines: two processes on this one, over mlx's ring backend."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_folder
from helpers import ROOT

LAUNCH = Path(sys.executable).parent / "mlx.launch"


def free_port():
    """The first of two in a row; the ring takes one for each rank."""
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise RuntimeError("no two free ports in a row")


@pytest.mark.parametrize(
    ("mode", "name", "caches", "heads"),
    [
        ("tensor", "llama", 4, 1),
        ("pipeline", "qwen2", 2, 2),
        ("pipeline", "deepseek_v3", 2, 1),
    ],
)
def test_two_ranks_say_what_one_process_says(mode, name, caches, heads):
    """Half the KV heads, or half the layers, in compressed caches of their own."""
    done = subprocess.run(
        [LAUNCH, "-n", "2", "--backend", "ring", "-p", str(free_port()), "--",
         sys.executable, ROOT / "tests" / "distributed_worker.py", mode, name],
        capture_output=True, text=True, timeout=120, cwd=ROOT / "tests",
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    said = re.findall(
        r"rank=(\d) error=(\S+) caches=(\d+) heads=(\d+) packed=(\d+)", done.stdout
    )
    assert sorted(row[0] for row in said) == ["0", "1"], done.stdout + done.stderr
    for _, error, *counts, packed in said:
        # Partial sums round differently, and a few codes with them.
        assert float(error) < (0.005 if mode == "tensor" else 1e-5)
        assert [int(count) for count in counts] == [caches, heads]
        assert int(packed) > 0


def test_a_chat_is_for_one_machine(tmp_path):
    tiny_folder.write(tmp_path)
    launch = [LAUNCH, "-n", "2", "--backend", "ring", "-p", str(free_port()), "--"]
    chat = [sys.executable, "-m", "mlx_turboquant", "chat", "--model", str(tmp_path)]
    done = subprocess.run(
        [*launch, *chat], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    line = "error: a chat is for one machine; use mlx_tq.server on several"
    said = done.stdout + done.stderr
    assert said.count(line) == 2  # each rank's
    assert "Traceback" not in said
    alone = subprocess.run(
        [*chat, "--pipeline"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (alone.returncode, alone.stderr.startswith(line)) == (2, True)

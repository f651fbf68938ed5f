"""Hundreds of requests, a third of which are given up: bounded time, flat memory."""

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import MODEL
from serving_tools import STORY

REQUESTS = 500


def resident(process):
    """Kilobytes of a process's memory that are not swapped out."""
    asked = ["ps", "-o", "rss=", "-p", str(process.pid)]
    return int(subprocess.check_output(asked, text=True))


class Server:
    """A server in a process of its own, with little room for old texts."""

    def __init__(self):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlx_turboquant", "server", "--port", "0"),
                *("--model", str(MODEL), "--kv-bits", "3", "--decode-concurrency", "4"),
                *("--prompt-cache-bytes", "20MB", "--kv-memory", "60MB"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stderr:
            if "Listening on" in line:
                break
        self.url = line.split()[-1]
        # The rest of the log, so that its pipe is never full.
        self.log = ThreadPoolExecutor(1)
        self.rest = self.log.submit(self.process.stderr.read)

    def open(self, **fields):
        body = json.dumps(fields).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body)
        return urllib.request.urlopen(request, timeout=120)

    def metrics(self):
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def close(self):
        self.process.terminate()
        self.process.wait(60)
        self.rest.result()
        self.process.stderr.close()
        self.log.shutdown()


@pytest.mark.sweep
def test_a_soak_with_cancellations_ends_in_time_with_flat_memory():
    server, dice = Server(), random.Random(0)
    whole = {}

    def one(number):
        """Some are streamed, some given up early, some given up at once."""
        start = dice.randrange(0, 200, 20)
        fields = {"prompt": STORY[start : start + 150], "max_tokens": 4}
        kind = number % 6
        if kind == 0:  # a stream that is left after a few events
            with server.open(**fields | {"stream": True, "max_tokens": 2000}) as answer:
                for _ in range(dice.randrange(1, 8)):
                    answer.readline()
            return "left"
        if kind == 1:  # a long prompt that nobody waits for
            # Begins in its own way: what a shorter text takes from it would be codes.
            fields |= {"prompt": f"Long. {STORY}", "max_tokens": 2000}
            fields |= {"stream": True}
            server.open(**fields).close()
            return "left"
        with server.open(**fields) as answer:
            text = json.loads(answer.read())["choices"][0]["text"]
        assert whole.setdefault(start, text) == text
        return "whole"

    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(one, range(300)))
            early = resident(server.process)
            begun = time.monotonic()
            kinds = list(pool.map(one, range(REQUESTS)))
            seconds = time.monotonic() - begun
        late = resident(server.process)
        deadline = time.monotonic() + 10
        while server.metrics()["mlx_tq_requests_running"]:
            assert time.monotonic() < deadline
        metrics = server.metrics()
    finally:
        server.close()
    print(f"{seconds:.0f} s, {early} kB then {late} kB, {os.uname().sysname}")
    assert kinds.count("whole") == REQUESTS - 2 * (-(-REQUESTS // 6))
    assert metrics["mlx_tq_faults"] == 0
    assert metrics["mlx_tq_reserved_bytes"] == 0
    assert metrics["mlx_tq_cache_bytes"] <= 20_000_000
    # Given up early, not written to their ends: 2000 tokens each would be 300,000.
    assert metrics['mlx_tq_tokens_total{kind="generated"}'] < 60 * REQUESTS
    assert late < 1.02 * early
    assert seconds < 600
    assert server.process.returncode == 0

"""Hundreds of requests, some given up, and servers that are killed.

Time is bounded, memory flat, and no answer is another one for it.
"""

import contextlib
import http.client
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import MODEL
from serving_tools import STORY

from mlx_turboquant.conversations.disk import DiskFolder

REQUESTS = 500


def resident(process):
    """Kilobytes of a process's memory that are not swapped out."""
    asked = ["ps", "-o", "rss=", "-p", str(process.pid)]
    return int(subprocess.check_output(asked, text=True))


class Server:
    """A server in a process of its own."""

    def __init__(self, *options):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlx_turboquant", "server", "--port", "0"),
                *("--model", str(MODEL), "--decode-concurrency", "4", *options),
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

    def close(self, kill=False):
        """End it; returns what else it logged."""
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        self.process.wait(60)
        rest = self.rest.result()
        self.process.stderr.close()
        self.log.shutdown()
        return rest


@pytest.mark.sweep
def test_a_soak_with_cancellations_ends_in_time_with_flat_memory():
    dice = random.Random(0)
    server = Server(
        *("--kv-bits", "3", "--prompt-cache-bytes", "20MB", "--kv-memory", "60MB")
    )
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
            # Until as many texts are kept as there is room for.
            list(pool.map(one, range(600)))
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


#: Lengths of prompts in tokens: some end within a page.
LENGTHS = (130, 260, 390, 650)
#: A folder in which not all of these fit: files are dropped all the time.
TEXTS, KILLS, ROOM = 6, 10, 4_000_000
#: What codes of 8 bits may change of a log probability, and what is no longer in doubt.
NEAR, SURE = 0.1, 0.25


def answer_of(server, prompt):
    """Cached tokens; for each of the answer, its id and log probabilities by id."""
    fields = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 4}
    with server.open(**fields) as got:
        answer = json.loads(got.read())
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    said = [
        (token["id"], {one["id"]: one["logprob"] for one in token["top_logprobs"]})
        for token in answer["choices"][0]["logprobs"]["content"]
    ]
    return cached, said


def same(said, wanted):
    """Whether answers agree until two tokens are too close to tell."""
    for (token, logprobs), (right, right_logprobs) in zip(said, wanted, strict=True):
        for one, logprob in right_logprobs.items():
            if abs(logprobs.get(one, logprob) - logprob) > NEAR:
                return False
        best, second, *_ = sorted(right_logprobs.values(), reverse=True)
        if best - second < SURE:
            return token in right_logprobs
        if token != right:
            return False
    return True


def records_of(folder):
    """Keys of all records that its index has."""
    with sqlite3.connect(folder / "index.sqlite") as index:
        found = [key for (key,) in index.execute("SELECT key FROM records")]
    index.close()
    return found


@pytest.mark.sweep
def test_killed_servers_of_one_folder_give_no_wrong_byte(tmp_path, caplog):
    """Answers are those of a server that keeps nothing; all that is kept is counted."""
    dice, words = random.Random(0), STORY.split()
    spec = ("--kv-bits", "k8v8,page=32,window=8")
    texts = [" ".join(dice.choices(words, k=2000)) for _ in range(TEXTS)]
    plain = Server(*spec, "--prompt-cache-bytes", "1KB")
    prompts = [text[: 4 * length] for text in texts for length in LENGTHS]
    wanted = {prompt: answer_of(plain, prompt)[1] for prompt in prompts}
    plain.close()
    kept = (*spec, "--prompt-cache-size", "3", "--kv-dir", str(tmp_path / "kv"))
    kept = (*kept, "--kv-disk", str(ROOM))
    answered, wrong, reused, log = [], [], 0, []

    def ask(server, chance):
        """One prompt after the other, with pauses in which texts are written."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            while True:
                prompt = chance.choice(prompts)
                cached, said = answer_of(server, prompt)
                answered.append(cached)
                if not same(said, wanted[prompt]):
                    wrong.append((cached, prompt[:40], said, wanted[prompt]))
                time.sleep(chance.choice((0, 0, 0, 3)))

    for _ in range(KILLS):
        servers = [Server(*kept) for _ in range(2)]
        # Nobody has read anything here: what is cached is the folder's.
        reused += any(answer_of(servers[0], text[:1000])[0] for text in texts[:3])
        with ThreadPoolExecutor(4) as pool:
            for server in servers * 2:
                pool.submit(ask, server, random.Random(dice.random()))
            enough = len(answered) + dice.randrange(8, 16)
            deadline = time.monotonic() + 60
            while len(answered) < enough:
                assert time.monotonic() < deadline
                time.sleep(dice.uniform(0, 0.3))
            # They may be in the middle of anything.
            log += [server.close(kill=True) for server in servers]
        folder = DiskFolder(tmp_path / "kv", ROOM)
        sizes = [path.stat().st_size for path in folder.folder.glob("*.kv")]
        assert folder.nbytes == sum(sizes)
        # Each may be about to write a file that the other one does not see yet.
        assert sum(sizes) <= ROOM + 2 * (ROOM // 8 + 100_000)
        for key in records_of(folder.folder):
            assert folder.read([key]) is not None
        folder.close()
    assert not wrong, wrong[0]
    assert not caplog.records
    from_kept = sum(cached > 0 for cached in answered)
    print(f"{len(answered)} answers, {from_kept} from texts kept, {reused} starts")
    assert len(answered) >= 8 * KILLS
    assert reused >= KILLS // 2
    lines = (line for text in log for line in text.splitlines())
    assert not [line for line in lines if " - INFO - " not in line]

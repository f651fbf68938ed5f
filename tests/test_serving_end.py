"""Requests that are given up, faults beside others, and the end: what is kept."""

import signal
import subprocess
import sys
import threading
import time
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import agents
import mlx.core as mx
import pytest
from helpers import MODEL, ROOT
from mlx_lm import generate
from mlx_lm.server import CompletionRequest, GenerationContext
from serving_tools import LIMIT, SPEC, STORY, Running, until

import mlx_turboquant as tq
from mlx_turboquant import pacing
from mlx_turboquant.cache import layer
from mlx_turboquant.conversations.disk import DiskFolder
from mlx_turboquant.errors import RequestError
from mlx_turboquant.integrations import supervision, text_writer
from mlx_turboquant.integrations.rows import GuardedBatch
from mlx_turboquant.integrations.tickets import Ticket


class Asked:
    """A request in front of the thread, and what becomes of it.

    Args:
        running: The server.
        prompt: Its tokens.
        on: Called with each item, in the generation thread.
        leaves_at: Tokens of the prompt after which its client hangs up; None: never.
    """

    def __init__(
        self,
        running,
        prompt,
        on=lambda item: None,
        max_tokens=4,
        seed=None,
        leaves_at=None,
    ):
        self.items, self.over = [], threading.Event()
        self._on, self._leaves_at = on, leaves_at
        self.ticket = Ticket(self._take)
        arguments = agents.arguments(max_tokens)
        arguments.seed = seed
        asked = CompletionRequest("text", prompt, [], None, None)
        running.generator.submit(self.ticket, asked, arguments)

    def _take(self, item):
        self.items.append(item)
        self._on(item)
        is_progress = isinstance(item, tuple)
        if self._leaves_at is not None and is_progress and item[0] >= self._leaves_at:
            self.ticket.cancel()
        if item is None or isinstance(item, Exception):
            self.over.set()

    @property
    def cached(self):
        """Tokens of its prompt that were not read."""
        assert self.over.wait(LIMIT)
        (context,) = (i for i in self.items if isinstance(i, GenerationContext))
        return context.prompt_cache_count


def text_of(running, length, seed=0):
    size = running.generator.model_provider.tokenizer.vocab_size
    return [(7919 * i + 31 * seed) % (size - 10) + 5 for i in range(length)]


# Requests that are given up.


def test_what_was_read_for_a_client_that_left_is_kept():
    """Up to the last step, whatever it leaves in: its prompt or its answer."""
    running = Running(prefill_step_size=64)
    running.generator._time_budget = [None]  # looks who left after each step
    try:
        prompt = text_of(running, 400)

        Asked(running, prompt, leaves_at=192)
        until(lambda: len(running.cache))
        assert Asked(running, prompt).cached == 192
        # Another one leaves while it is answered.
        other = text_of(running, 100, seed=1)
        tokens = []

        def leave_later(item):
            if hasattr(item, "token"):
                tokens.append(item.token)
                if len(tokens) == 5:
                    answered.ticket.cancel()

        answered = Asked(running, other, leave_later, max_tokens=500)
        until(lambda: not running.generator.open_tickets())
        again = Asked(running, [*other, *tokens, 9])
        assert again.cached >= len(other) + 4
    finally:
        running.close()


def test_what_is_kept_already_is_not_kept_twice():
    running = Running(prefill_step_size=64)
    running.generator._time_budget = [None]
    try:
        prompt = text_of(running, 300)
        assert Asked(running, prompt).cached == 0
        until(lambda: len(running.cache) == 1)

        Asked(running, prompt[:200], leaves_at=0, max_tokens=500)
        assert Asked(running, prompt[:50]).cached == 49
        until(lambda: len(running.cache) > 1)
        lengths = [len(entry.tokens) for entry in running.cache._kept]
        assert lengths == [304, 54]
    finally:
        running.close()


@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_states_that_cannot_go_back_are_kept_between_steps_only(tmp_path, hooked):
    """A recurrent layer that has seen a step which others have not is of no use."""
    path = agents.save_tiny("hybrid", tmp_path)
    running = Running(model=str(path), prefill_step_size=64)
    generator = running.generator
    generator._time_budget = [None]
    try:
        prompt = text_of(running, 400)

        Asked(running, prompt, leaves_at=128)
        until(lambda: len(running.cache))
        (kept,) = running.cache._kept
        assert len(kept.tokens) == 128
        running.cache.forget()
        generator._keep(prompt[:128], kept.caches, True)
        assert not running.cache._kept
        generator._keep(prompt[:128], kept.caches, False)
        assert Asked(running, prompt).cached == 128
    finally:
        running.close()


# Faults.


class Fault(RuntimeError):
    pass


def test_who_waits_for_another_s_prompt_survives_its_fault(monkeypatch):
    """The one that is read fails; what is parked behind it is served, once."""
    running = Running(prefill_step_size=32)
    monkeypatch.setattr(supervision, "_PAUSE", 0.0)
    generator, others = running.generator, []
    generator._time_budget = [None]
    try:
        long = text_of(running, 600)
        step = GuardedBatch._next

        def failing(self):
            if len(generator._waiting) == 2 and not generator.faults:
                raise Fault("planted")
            return step(self)

        def others_come(item):
            if isinstance(item, tuple) and not others:
                others.extend(Asked(running, [*long[:300], i]) for i in (1, 2))

        monkeypatch.setattr(GuardedBatch, "_next", failing)
        first = Asked(running, long, others_come)
        assert first.over.wait(LIMIT)
        assert "planted" in str(first.items[-1])
        cached = [other.cached for other in others]
        assert [other.items[-1] for other in others] == [None, None]
        assert cached == [0, 300]
        assert generator.faults == 1
        # Nobody is answered twice.
        for other in others:
            contexts = [i for i in other.items if isinstance(i, GenerationContext)]
            tokens = [i for i in other.items if hasattr(i, "token")]
            assert (len(contexts), len(tokens)) == (1, 4)
    finally:
        running.close()


def test_who_waits_for_a_batch_to_end_survives_its_fault(monkeypatch):
    """One with a seed is served alone, behind the rows that run."""
    running = Running()
    monkeypatch.setattr(supervision, "_PAUSE", 0.0)
    generator = running.generator
    try:
        step, draining = GuardedBatch._next, []

        def failing(self):
            if draining and generator._latest is not None and not generator.faults:
                raise Fault("planted")
            return step(self)

        monkeypatch.setattr(GuardedBatch, "_next", failing)
        running_one = Asked(running, text_of(running, 50), max_tokens=5000)
        until(lambda: running_one.ticket.started)
        alone = Asked(running, text_of(running, 60, seed=1), seed=7)
        draining.append(1)
        assert running_one.over.wait(LIMIT)
        assert isinstance(running_one.items[-1], RequestError)
        assert alone.over.wait(LIMIT)
        assert alone.items[-1] is None, alone.items[-1]
        assert generator.faults == 1
    finally:
        running.close()


def test_a_request_that_is_the_fault_is_put_back_once(monkeypatch):
    running = Running()
    monkeypatch.setattr(supervision, "_PAUSE", 0.0)

    def fail(arguments):
        raise Fault("planted")

    try:
        monkeypatch.setattr(running.generator, "_is_batchable", fail)
        asked = Asked(running, text_of(running, 20))
        assert asked.over.wait(LIMIT)
        assert isinstance(asked.items[-1], RequestError)
        monkeypatch.undo()
        until(lambda: running.generator.faults == 2)
        assert Asked(running, text_of(running, 20)).cached == 0
    finally:
        running.close()


# Numbers that other threads look at.


def test_the_store_is_counted_in_its_own_thread(monkeypatch):
    running = Running()
    try:
        running.complete(STORY[:200])
        counting = []
        real = type(running.cache).nbytes.fget

        def nbytes(store):
            counting.append(threading.current_thread())
            return real(store)

        monkeypatch.setattr(type(running.cache), "nbytes", property(nbytes))
        running.complete(STORY[:300])
        until(lambda: running.generator.kept == (2, real(running.cache)))
        text = running.raw(None, method="GET", path="/metrics")[1].decode()
        lines = dict(
            line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"
        )
        assert float(lines["mlx_tq_cache_bytes"]) == real(running.cache) > 10_000
        assert float(lines["mlx_tq_cache_texts"]) == 2
        assert set(counting) == {running.generator._generation_thread}
    finally:
        running.close()


# The end.


def test_a_step_is_given_up_between_layers(monkeypatch, tmp_path, books):
    """What earlier steps have read is kept, and written to the folder."""
    folder = DiskFolder(tmp_path / "kv", 10**9)
    running = Running(prefill_step_size=256, folder=folder)
    generator, calls = running.generator, []

    def pace(arrays):
        calls.append(generator._stop)
        if len(calls) == 8 + 3:
            generator._stop = True
        pacing.pace(arrays)

    monkeypatch.setattr(layer, "pace", pace)
    prompt = text_of(running, 700)
    asked = Asked(running, prompt)
    try:
        assert asked.over.wait(LIMIT)
    finally:
        running.close()
    assert isinstance(asked.items[-1], RequestError)
    assert asked.items[-1].status == 503
    # Eight layers of the first step, and three of the second, the last of which ended.
    assert calls == [False] * 11
    monkeypatch.undo()
    again = Running(folder=DiskFolder(tmp_path / "kv", 10**9))
    try:
        answer = again.complete(prompt)
        assert 256 - 32 < answer.usage.prompt_tokens_details.cached_tokens <= 256
    finally:
        again.close()
    model, tokenizer = books
    cache = tq.make_prompt_cache(model, SPEC)
    alone = generate(model, tokenizer, prompt, max_tokens=12, prompt_cache=cache)
    assert answer.choices[0].text == alone


def test_texts_are_written_while_the_last_answers_are(tmp_path):
    folder = DiskFolder(tmp_path / "kv", 10**9)
    running = Running(folder=folder)
    try:
        for i in range(3):
            running.complete(f"{i} {STORY}", max_tokens=1)
        with running.complete(STORY[:50], max_tokens=4000, stream=True) as stream:
            next(stream)
            running.generator.begin_end()
            watch = DiskFolder(tmp_path / "kv", 10**9)
            kept = running.cache._kept
            until(lambda: sum(one.saved != "" for one in list(kept)) == 3)
            assert watch.nbytes > 100_000
            watch.close()
            next(stream)
    finally:
        running.close()


def test_a_request_ends_a_write_and_a_stream_lets_some_be_done(monkeypatch):
    """What is written while nobody asks is told who comes; what is while one does."""
    running, begun, over, busy = Running(), threading.Event(), [], []

    def idle(is_wanted):
        begun.set()
        until(is_wanted)
        over.append(True)

    monkeypatch.setattr(running.cache, "busy", lambda: busy.append(True))
    try:
        with running.complete("The", max_tokens=4000, stream=True) as stream:
            next(stream)
            until(lambda: len(busy) >= 2)  # once a second
        running.settled()
        monkeypatch.setattr(running.cache, "idle", idle)
        assert begun.wait(LIMIT)
        running.complete("The", max_tokens=1)
        assert over
        monkeypatch.undo()
        assert running.is_well()
    finally:
        running.close()


def test_when_time_is_over_the_last_used_texts_are_written(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(text_writer, "PAGES_AFTER", LIMIT)
    folder = DiskFolder(tmp_path / "kv", 10**9)
    running = Running(folder=folder)
    for i in range(3):
        running.complete(f"{i} {STORY}", max_tokens=1)
    running.settled()
    monkeypatch.setattr(running.generator, "begin_end", lambda: None)
    running.http.should_exit = True
    running._thread.join()
    running.client.close()
    saved, save = [], running.cache._writer.save
    latest = max(entry.used for entry in running.cache._kept)

    def save_and_tell(entry, whole):
        assert whole == (entry.used == latest)
        saved.append(entry.used)
        save(entry, whole)

    # It is late as soon as one is written.
    clock = types.SimpleNamespace(monotonic=lambda: LIMIT + len(saved))
    monkeypatch.setattr(text_writer, "time", clock)
    monkeypatch.setattr(running.cache._writer, "save", save_and_tell)
    running.generator._end_by = LIMIT + 1
    running.generator.stop_and_join()
    assert saved == [latest]
    assert "no time was left to write 2 texts" in caplog.text


#: A server whose every step takes a minute.
HANGS = f"""
import time
import types
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from mlx_turboquant.integrations import text_writer, supervision
from mlx_turboquant.integrations.rows import GuardedBatch
from mlx_turboquant.serving import run
from mlx_turboquant.cli import serve
GuardedBatch.next = lambda self: time.sleep(60)
run._LAST_WORDS, supervision._LAST_TEXT = 1, 0.2
serve.main(["--model", {str(MODEL)!r}, "--port", "0", "--grace", "0.2"])
"""


def test_a_step_that_cannot_be_given_up_does_not_hold_the_end():
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    line = next(line for line in process.stderr if "Listening on" in line)
    url = line.split()[-1]

    def read(path, body=None):
        with urllib.request.urlopen(url + path, body, timeout=LIMIT) as answer:
            return answer.read().decode()

    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(read, "/v1/completions", b'{"prompt": "The"}')
            until(lambda: "\nmlx_tq_requests_waiting 1.0\n" in read("/metrics"))
            begun = time.monotonic()
            process.terminate()
            _, log = process.communicate(timeout=LIMIT)
            seconds = time.monotonic() - begun
            error = asked.exception()
    finally:
        process.kill()
    assert process.returncode == 0
    assert seconds < 30, "not the minute of a step"
    assert "Ended in the middle of a step" in log
    assert error.code == 503
    error.close()


#: A server whose model takes a minute to load.
LOADS = f"""
import sys, time
from mlx_turboquant.integrations import server, supervision
from mlx_turboquant.cli import serve
def load(self):
    print("it loads", file=sys.stderr, flush=True)
    time.sleep(60)
server.Provider.load_default = load
supervision._LAST_TEXT = 0.2
serve.main(["--model", {str(MODEL)!r}, "--port", "0"])
"""


def test_a_model_that_is_loaded_does_not_hold_the_end():
    process = subprocess.Popen(
        [sys.executable, "-c", LOADS], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stderr.readline() == "it loads\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert time.monotonic() - begun < 30, "not a minute"
    assert process.returncode == 130
    assert "Traceback" not in log


@pytest.mark.parametrize("is_over", [False, True])
def test_steps_are_given_up_in_their_own_thread_only(is_over):
    pacing.give_up_when(lambda: is_over)
    raised = []

    def other():
        pacing.pace([mx.zeros(3)])
        raised.append(False)

    try:
        if is_over:
            with pytest.raises(pacing.Interrupted):
                pacing.pace([mx.zeros(3)])
        else:
            pacing.pace([mx.zeros(3)])
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert raised == [False]
    finally:
        pacing.give_up_when(lambda: False)

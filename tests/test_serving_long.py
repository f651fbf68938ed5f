"""Texts that take long to tokenize hold nobody up."""

import threading

import mlx_lm.server as host_server
import pytest
from serving_tools import LIMIT, STORY, Running, until

from mlx_turboquant.serving.service import Limits

LONG = STORY * 200


@pytest.fixture(scope="module")
def running():
    made = Running(limits=Limits(max_waiting=2))
    yield made
    made.close()


def test_who_comes_while_a_long_text_is_tokenized_is_answered(running, monkeypatch):
    """Its thread is another one; what becomes of it is the same, and it counts."""
    on, gate, got = [], threading.Event(), []
    tokenize = host_server.ResponseGenerator._tokenize

    def slow(self, tokenizer, request, args):
        if len(request.prompt) == len(LONG):
            on.append(threading.current_thread())
            assert gate.wait(LIMIT)
        return tokenize(self, tokenizer, request, args)

    monkeypatch.setattr(host_server.ResponseGenerator, "_tokenize", slow)

    def ask():
        got.append(running.ask(prompt=LONG, max_tokens=1))

    asking = [threading.Thread(target=ask) for _ in range(2)]
    try:
        for thread in asking[:1]:
            thread.start()
        until(lambda: on)
        assert running.is_well()
        asking[1].start()
        until(lambda: len(on) == 2)
        status, refused = running.ask(prompt="The", max_tokens=1)
        assert (status, refused["error"]["code"]) == (503, "queue_full")
    finally:
        gate.set()
        for thread in asking:
            thread.join()
    assert running.generator._generation_thread not in on
    assert len(on) == 2  # once each
    for status, answer in got:
        assert status == 400
        assert "8192" in answer["error"]["message"]
    assert running.is_well()


def test_a_long_text_that_fits_is_answered(running):
    """Bytes of a body are many, tokens of its prompt few."""
    fields = {"prompt": "The", "max_tokens": 4, "temperature": 0}
    short = running.ask(**fields)[1]["choices"][0]["text"]
    status, answer = running.ask(**fields, metadata={"note": LONG})
    assert (status, answer["choices"][0]["text"]) == (200, short)
    assert running.service._long_texts.count == 0

"""No request ends the server: what each wrong value gets, in OpenAI's error form."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import bench_faults
import mlx.core as mx
import openai
import pytest
from helpers import ROOT
from serving_faults import ACCEPTED, REFUSED
from serving_tools import STORY, Running, until

from mlx_turboquant.errors import RequestError
from mlx_turboquant.integrations import supervision
from mlx_turboquant.integrations.rows import GuardedBatch
from mlx_turboquant.serving.fields import CompletionFields, parse
from mlx_turboquant.serving.service import Limits

USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def running():
    made = Running()
    yield made
    made.close()


#: Body, what the answer says, and the field that it names.
MALFORMED = {
    "json": (b'{"prompt": "a", ', "not JSON", None),
    "list": (b"[1, 2]", "should be an object", None),
    "utf8": (b'{"prompt": "\xff\xfe"}', "not JSON in UTF-8", None),
    "surrogate": (b'{"prompt": "\\ud800"}', "not JSON in UTF-8", None),
    "deep": (b"[" * 100_000, "recursion limit", None),
    "nothing": (b"", "not JSON", None),
    "no prompt": (b"{}", "has no prompt", "prompt"),
    "empty": (b'{"prompt": ""}', "no tokens", None),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_bodies_are_refused_in_words(running, case):
    body, says, param = MALFORMED[case]
    status, answer = running.raw(body)
    assert status == 400
    assert says in answer["error"]["message"]
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"


CASES = [
    (name, value, says) for name, cases in REFUSED.items() for value, says in cases
]


@pytest.mark.parametrize(("name", "value", "says"), CASES)
def test_a_wrong_value_is_refused_by_name(running, name, value, says):
    fields = {"prompt": "a", "temperature": 1, "max_tokens": 2, name: value}
    status, answer = running.ask(**fields)
    assert status == 400, answer
    error = answer["error"]
    assert says in error["message"]
    assert error["param"].split(".")[0] == name
    assert running.is_well()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": [""] * 300_000}, "prompt is"),
        ({"prompt": [-1] * 300_000}, "prompt is"),
        (
            {"prompt": "a", "logit_bias": {str(i): 1e9 for i in range(200_000)}},
            "at most 4096 tokens, here are 200000",
        ),
    ],
)
def test_what_is_wrong_a_million_times_is_said_once(fields, says):
    """An error for each member would be gigabytes, and seconds for everyone."""
    body = json.dumps(fields).encode()
    begun = time.process_time()
    with pytest.raises(RequestError, match=says) as caught:
        parse(CompletionFields, body)
    assert time.process_time() - begun < 1.0
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_values_at_the_limits_are_served(running, fields):
    given = {"prompt": "The sea", "temperature": 1, "max_tokens": 3, **fields}
    status, answer = running.ask(**given)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] >= 1
    assert json.dumps(answer, allow_nan=False)
    assert running.is_well()


CHATS = {
    "no messages": ({"messages": []}, "at least 1"),
    "a text": ({"messages": "hi"}, "valid array"),
    "no role": ({"messages": [{"content": "a"}]}, "no messages.0.role"),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, "string"),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "messages.0.content",
    ),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "chat template",
    ),
    "an image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": "file:///etc/passwd"}
                    ],
                }
            ]
        },
        "takes no images",
    ),
    "broken arguments": (
        {
            "messages": [
                *USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                },
            ]
        },
        "chat template",
    ),
    "tools": (
        {"messages": USER, "tools": [{"type": "function"}]},
        "no tools.0.function",
    ),
    "forced tools": ({"messages": USER, "tool_choice": "required"}, "'auto' or 'none'"),
    "a template": (
        {"messages": USER, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "the server's to set",
    ),
    "no tokens": (
        {"messages": USER, "chat_template_kwargs": {"tokenize": False}},
        "the server's to set",
    ),
    "json": ({"messages": USER, "response_format": {"type": "json_object"}}, "'text'"),
}


@pytest.mark.parametrize("case", CHATS)
def test_chats_that_cannot_be_read_are_refused(running, case):
    fields, says = CHATS[case]
    status, answer = running.ask("/v1/chat/completions", max_tokens=2, **fields)
    assert status == 400
    assert says in answer["error"]["message"]
    assert running.is_well()


def test_an_answer_ends_at_the_context(running, monkeypatch):
    """However many tokens are asked for."""
    monkeypatch.setattr(supervision, "context_length", lambda model: 60)
    answer = running.complete("word " * 20, max_tokens=2**31 - 1)
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == 60
    assert answer.choices[0].finish_reason == "length"


def test_a_prompt_beyond_the_context_is_refused_in_words(running):
    with pytest.raises(openai.BadRequestError, match=r"context is 8192; shorten it"):
        running.complete("word " * 8500)
    assert running.is_well()


@pytest.mark.parametrize("sampling", [{}, {"seed": 1}])
def test_a_text_that_goes_on_exactly_where_one_ended(running, sampling):
    """All of it is stored; mlx-lm's thread dies of having nothing to read."""
    prompt = [5, 6, 7, 8, 9, 10]
    first = running.complete(prompt, max_tokens=5, logprobs=1)
    tokens = [one["id"] for one in first.choices[0].logprobs.content]
    again = running.complete(prompt + tokens, max_tokens=5, **sampling)
    assert again.usage.prompt_tokens == 11
    assert again.usage.completion_tokens == 5
    assert running.is_well()


class Planted(Exception):
    """A fault of a sampler that no check foresees."""


def test_a_fault_of_one_row_ends_that_row_only(running, monkeypatch):
    """A sampler that fails in the middle of a batch; the others write on."""
    prompts = [STORY[:200], STORY[:260]]
    expected = [running.complete(p, max_tokens=40).choices[0].text for p in prompts]
    insert = GuardedBatch._guarded_sampler

    def guarded(self, row, sampler):
        steps = iter(range(5))

        def failing(logprobs):
            if next(steps, None) is None:
                raise Planted("not today")
            return sampler(logprobs)

        is_victim = "greedy" not in getattr(sampler, "__name__", "")
        return insert(self, row, failing if is_victim else sampler)

    monkeypatch.setattr(GuardedBatch, "_guarded_sampler", guarded)
    with ThreadPoolExecutor(3) as pool:
        victim = pool.submit(
            running.ask, prompt=STORY[:300], temperature=1, max_tokens=400
        )
        others = [pool.submit(running.complete, p, max_tokens=40) for p in prompts]
        status, answer = victim.result()
        texts = [other.result().choices[0].text for other in others]
    assert status == 500
    assert "Planted: not today" in answer["error"]["message"]
    assert answer["error"]["type"] == "server_error"
    assert texts == expected
    assert running.is_well()


def test_a_fault_of_the_thread_fails_its_requests_and_it_goes_on(monkeypatch):
    made = Running()
    monkeypatch.setattr(supervision, "_PAUSE", 0.0)
    try:
        expected = made.complete(STORY[:200]).choices[0].text
        step, left = GuardedBatch._next, [3]

        def failing(self):
            left[0] -= 1
            if left[0] == 0:
                raise mx_error("out of memory")
            return step(self)

        mx_error = RuntimeError
        monkeypatch.setattr(GuardedBatch, "_next", failing)
        with ThreadPoolExecutor(2) as pool:
            prompts = [STORY[:150], STORY[:250]]
            answers = [pool.submit(made.ask, prompt=p, max_tokens=50) for p in prompts]
            answers = [answer.result() for answer in answers]
        failed = [answer for status, answer in answers if status == 500]
        assert failed
        assert "out of memory" in failed[0]["error"]["message"]
        assert made.generator.faults == 1
        assert made.raw(None, method="GET", path="/health")[0] == 200
        assert made.complete(STORY[:200]).choices[0].text == expected
    finally:
        made.close()


def test_streams_end_with_the_error_that_they_meet(running, monkeypatch):
    def fail(self, row, sampler):
        def sample(logprobs):
            self._faults[row] = Planted("in a stream")
            return mx.argmax(logprobs, axis=-1)

        return sample

    monkeypatch.setattr(GuardedBatch, "_guarded_sampler", fail)
    with pytest.raises(openai.APIError, match="in a stream"):
        list(running.complete(STORY[:100], temperature=1, stream=True))
    monkeypatch.undo()
    assert running.is_well()


def test_what_waits_is_bounded(running):
    """Further requests are refused at once, and told when to ask again."""
    before = running.service._limits
    running.service._limits = type(before)(max_waiting=0)
    try:
        status, answer = running.ask(prompt="a")
    finally:
        running.service._limits = before
    assert status == 503
    assert answer["error"]["code"] == "queue_full"
    assert running.is_well()


def test_an_answer_may_take_so_long_and_no_longer():
    made = Running(limits=Limits(request_seconds=1.0))
    try:
        status, answer = made.ask(prompt=STORY, max_tokens=8000)
        assert status == 504
        assert "longer than 1 s" in answer["error"]["message"]
        until(lambda: not made.generator.open_tickets())
        made.service._limits = Limits()
        assert made.is_well()
    finally:
        made.close()


def test_the_list_of_faults_names_what_was_tried():
    """Each row, by all of its fields, in the order that they were asked in."""
    text = (ROOT / "benchmarks" / "results" / "faults-cpu.txt").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| {")]
    named = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert named == [json.dumps(fields) for fields in bench_faults.tried()]
    assert len(set(named)) == len(named) == 75

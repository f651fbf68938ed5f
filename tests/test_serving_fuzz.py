"""Whatever a request says, it gets an answer in its own form, and the next one too.

Every field of every request gets values of wrong and right types, sizes and extremes,
one to four fields at a time. After each request the server still answers.
"""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_tools import Running

from mlx_turboquant.integrations import supervision
from mlx_turboquant.serving.anthropic_fields import CountFields, MessagesFields
from mlx_turboquant.serving.fields import ChatFields, CompletionFields

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER = {"role": "user", "content": "The sea"}
BASES = {
    CHAT: {"messages": [USER]},
    TEXT: {"prompt": "The sea"},
    MESSAGES: {"messages": [USER], "max_tokens": 2},
    COUNT: {"messages": [USER]},
}
KINDS = {
    CHAT: ChatFields,
    TEXT: CompletionFields,
    MESSAGES: MessagesFields,
    COUNT: CountFields,
}
#: What such a request may get; 404 for models that are not served.
STATUSES = {200, 400, 404, 413}

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([16383, 16384, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30]),
    st.integers(),
    st.floats(0, 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e-320, 1e-45, 1e38, 1e39, 1e308, -0.0, 0.5, 1.0, 2.0]),
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "a" * 2000, "🌊" * 300, "\u202e", "5", "true", "{{ 1 }}"]
    ),
    st.sampled_from(["default_model", "/etc/passwd", "file:///etc/passwd", "../.."]),
    st.sampled_from(
        ["user", "assistant", "system", "tool", "text", "function", "auto"]
    ),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
names = st.one_of(
    texts,
    st.sampled_from(["type", "role", "content", "text", "name", "function", "url"]),
    st.integers(-1, 20000).map(str),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)
    ),
    max_leaves=12,
)
blocks = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "image", "image_url", "tool_use", "tool_result"]
        )
    },
    optional={
        "text": leaves,
        "id": leaves,
        "name": texts,
        "input": values,
        "tool_use_id": texts,
        "content": values,
        "image_url": values,
        "source": values,
    },
)
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": texts, "arguments": values})},
    optional={"id": leaves, "type": leaves},
)
messages = st.lists(
    st.one_of(
        values,
        st.fixed_dictionaries(
            {"role": texts, "content": st.one_of(texts, st.lists(blocks, max_size=3))},
            optional={
                "tool_calls": st.lists(calls, max_size=2),
                "name": leaves,
                "tool_call_id": leaves,
                "reasoning_content": leaves,
                "other": values,
            },
        ),
    ),
    max_size=4,
)
tiny_and_large = st.sampled_from([0, 0.0, 1e-300, 1e-40, 0.3, 0.5, 1, 1.0])
penalties = st.sampled_from([-100, -1.5, 0, 1e-300, 0.5, 1, 2, 100])
windows = st.sampled_from([0, 1, 2, 7, 1 << 20])
schemas = st.dictionaries(names, values, max_size=3)
#: Values that are right or nearly so, which chance would not find.
NEARLY = {
    "model": st.sampled_from(["default_model", "other", "/etc"]),
    "draft_model": st.sampled_from(["default_model", "/etc"]),
    "messages": messages,
    "system": st.one_of(texts, st.lists(blocks, max_size=2)),
    "logit_bias": st.dictionaries(
        st.integers(-1, 16384).map(str), st.floats(-101, 101), max_size=4
    ),
    "stop": st.one_of(texts, st.lists(texts, max_size=4)),
    "stop_sequences": st.lists(texts, max_size=4),
    "prompt": st.one_of(
        texts,
        st.lists(st.integers(-1, 16384), max_size=5),
        st.lists(texts, max_size=2),
    ),
    "chat_template_kwargs": st.dictionaries(
        st.one_of(texts, st.sampled_from(["enable_thinking", "tokenize", "tools"])),
        values,
        max_size=3,
    ),
    "role_mapping": st.dictionaries(texts, texts, max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.one_of(st.booleans(), st.integers(-1, 21)),
    "top_logprobs": st.integers(-2, 21),
    "temperature": st.sampled_from([0, 1e-320, 1e-30, 0.7, 1, 1e30, 1e300]),
    "top_p": tiny_and_large,
    "min_p": tiny_and_large,
    "xtc_probability": tiny_and_large,
    "xtc_threshold": st.sampled_from([0, 1e-300, 0.1, 0.5]),
    "top_k": st.sampled_from([0, 1, 2, 16383, 16384]),
    "repetition_penalty": st.sampled_from([0, 1e-300, 0.5, 1, 1.1, 100]),
    "repetition_context_size": windows,
    "presence_penalty": penalties,
    "presence_context_size": windows,
    "frequency_penalty": penalties,
    "frequency_context_size": windows,
    "seed": st.sampled_from([-(2**63), -1, 0, 1, 2**63, 2**64 - 1]),
    "max_tokens": st.sampled_from([1, 2, 5, 2**31 - 1]),
    "max_completion_tokens": st.sampled_from([1, 3, 2**31 - 1]),
    "num_draft_tokens": st.sampled_from([1, 3, 64]),
    "tool_choice": st.sampled_from(["auto", "none", {"type": "auto"}]),
    "thinking": st.fixed_dictionaries(
        {"type": st.sampled_from(["enabled", "disabled", "adaptive"])}
    ),
    "tools": st.lists(
        st.one_of(
            st.fixed_dictionaries({"name": texts, "input_schema": schemas}),
            st.fixed_dictionaries(
                {
                    "type": st.just("function"),
                    "function": st.fixed_dictionaries(
                        {"name": texts}, optional={"parameters": schemas}
                    ),
                }
            ),
        ),
        max_size=3,
    ),
}


def values_of(name):
    """Mostly what a field may nearly be, sometimes anything."""
    nearly = NEARLY.get(name, leaves)
    return st.integers(0, 5).flatmap(
        lambda i: (values, numbers, nearly, nearly, nearly, nearly)[i]
    )


@st.composite
def requests(draw):
    """(path, fields): a request with some fields replaced."""
    path = draw(st.sampled_from(list(BASES)))
    fields = dict(BASES[path], max_tokens=2)
    if path != COUNT and draw(st.booleans()):
        fields["temperature"] = 1  # or nothing is sampled
    known = sorted(KINDS[path].model_fields)
    for name in draw(st.lists(st.sampled_from(known), min_size=1, max_size=4)):
        fields[name] = draw(values_of(name))
    return path, fields


@pytest.fixture(scope="module")
def running():
    made = Running()
    with pytest.MonkeyPatch.context() as patch:
        # Answers are as long as they are asked to be, up to the context.
        patch.setattr(supervision, "context_length", lambda model: 48)
        yield made
    made.close()


def nested(depth, inner="{}"):
    """JSON of objects within one another."""
    return '{"a":' * depth + inner + "}" * depth


def chat(content, **more):
    return {"messages": [{"role": "user", "content": content, **more}]}


def call(arguments):
    """A message with a call, whose arguments are a text that mlx-lm reads as JSON."""
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "a", "type": "function", "function": function}]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"messages": [USER, said, USER]}


MEGABYTE = 1 << 20
#: Long, many, deep, by where they stand: path, and fields.
SIZES = {
    "words": (TEXT, {"prompt": "the sea " * (MEGABYTE // 8)}),
    "one word": (TEXT, {"prompt": "a" * MEGABYTE}),
    "spaces": (TEXT, {"prompt": " " * MEGABYTE}),
    "lines": (TEXT, {"prompt": "\n" * MEGABYTE}),
    "marks": (TEXT, {"prompt": "e" + "\u0301" * (MEGABYTE // 4)}),
    "pictures": (TEXT, {"prompt": "🌊" * (MEGABYTE // 4)}),
    "ids": (TEXT, {"prompt": [5] * 300_000}),
    "texts": (TEXT, {"prompt": ["a"] * 100_000}),
    "message": (CHAT, chat("the sea " * (MEGABYTE // 8))),
    "messages": (CHAT, {"messages": [USER] * 16384}),
    "too many messages": (CHAT, {"messages": [USER] * 16385}),
    "parts": (CHAT, chat([{"type": "text", "text": "the sea "}] * 4096)),
    "too many parts": (CHAT, chat([{"type": "text", "text": "a"}] * 4097)),
    "beside": (CHAT, chat("a", other=["a" * 1000] * 1000)),
    "role": (CHAT, {"messages": [{"role": "u" * 65, "content": "a"}]}),
    "stops": (CHAT, {**chat("a"), "stop": ["ab" * 512] * 64}),
    "biases": (
        CHAT,
        {**chat("a"), "logit_bias": {str(i): 0.5 for i in range(4096)}},
    ),
    "all biases": (
        CHAT,
        {**chat("a"), "logit_bias": {str(i): 0.5 for i in range(100_000)}},
    ),
    "tools": (
        CHAT,
        {
            **chat("a"),
            "tools": [{"type": "function", "function": {"name": "f"}}] * 4096,
        },
    ),
    "call": (CHAT, call('{"a": "' + "b" * MEGABYTE + '"}')),
    "deep call": (CHAT, call(nested(100_000))),
    "number": (CHAT, call('{"a": ' + "9" * 100_000 + "}")),
    "turns": (MESSAGES, {"messages": [USER] * 16384, "max_tokens": 2}),
    "system": (COUNT, {"messages": [USER], "system": "the sea " * (MEGABYTE // 8)}),
}
#: Those of an ordinary run.
FEW = ("one word", "marks", "ids", "messages", "parts", "deep call", "number")
#: Depths of objects, on both sides of the parser's own limit and of Python's.
DEPTHS = (100, 190, 210, 1100, 100_000)
#: Seconds for one, on a machine that runs other tests too: a second is usual.
BOUND = 60


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in FEW else pytest.mark.slow)
        for case in SIZES
    ],
)
def test_any_field_may_be_large(running, case):
    """The context of 48 tokens ends what is long; nothing takes long."""
    path, fields = SIZES[case]
    begun = time.monotonic()
    check(running, (path, {"max_tokens": 2, **fields}))
    assert time.monotonic() - begun < BOUND


#: Where an object of any depth may stand.
DEEP = {
    "beside": (CHAT, '{"messages": [{"role": "user", "content": "a", "b": DEEP}]}'),
    "messages": (CHAT, '{"messages": DEEP}'),
    "content": (CHAT, '{"messages": [{"role": "user", "content": DEEP}]}'),
    "tools": (
        CHAT,
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": '
        '"function", "function": {"name": "f", "parameters": DEEP}}]}',
    ),
    "variables": (
        CHAT,
        '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": '
        "DEEP}",
    ),
    "input": (
        MESSAGES,
        '{"max_tokens": 2, "messages": [{"role": "assistant", "content": [{"type": '
        '"tool_use", "id": "a", "name": "f", "input": DEEP}]}, {"role": "user", '
        '"content": "a"}]}',
    ),
    "unknown": (TEXT, '{"prompt": "a", "max_tokens": 2, "unknown": DEEP}'),
    "all": (TEXT, "DEEP"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in ("tools", "input") else pytest.mark.slow)
        for case in DEEP
    ],
)
def test_any_field_may_be_deep(running, case):
    (path, body), begun = DEEP[case], time.monotonic()
    for depth in DEPTHS:
        for inner in nested(depth), "[" * depth + "]" * depth:
            status, answer = running.raw(body.replace("DEEP", inner), path=path)
            assert status in STATUSES, (depth, answer)
    assert running.is_well()
    assert time.monotonic() - begun < BOUND


def check(running, request):
    path, fields = request
    status, answer = running.ask(path, **fields)
    assert status in STATUSES, answer
    if status != 200:
        error = answer["error"]
        assert error["message"]
        assert error["type"].endswith("_error")
    elif isinstance(answer, bytes):  # a stream
        last = answer.decode().strip().splitlines()[-1]
        assert last == "data: [DONE]" or '"message_stop"' in last
        assert b"server_error" not in answer
        assert b"api_error" not in answer
    else:
        assert json.dumps(answer, allow_nan=False)
    assert running.is_well()


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_any_field_may_be_anything(running, request):
    check(running, request)


@pytest.mark.sweep
@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_any_field_may_be_anything_at_length(running, request):
    check(running, request)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"]),
    path=st.one_of(
        st.sampled_from([*BASES, "/health", "/metrics", "/v1/models", "/v1/models/a"]),
        st.text("abcdefgh./%?#-_", max_size=30).map(lambda text: f"/{text}"),
    ),
    body=st.one_of(
        st.binary(max_size=200),
        st.sampled_from([b"{", b"null", b"[" * 5000, b'"', b"NaN", b'{"prompt":}']),
        values.map(lambda value: json.dumps(value).encode()),
    ),
)
def test_any_bytes_may_come(running, method, path, body):
    status, answer = running.raw(body, method=method, path=path)
    assert status < 500
    if isinstance(answer, dict) and status >= 400:
        assert answer["error"]["message"]
    assert running.is_well()

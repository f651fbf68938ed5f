"""Anthropic's form, asked by Anthropic's own client; tools in both forms."""

import contextlib
import json
import types

import anthropic
import mlx.core as mx
import mlx_lm.server as host_server
import openai
import pytest
from serving_tools import STORY, Running, until

from mlx_turboquant.serving import tool_images

TOOLS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}"
    "<tool_call>{{ tool_call.name or tool_call.function.name }}"
    "({{ tool_call.function.arguments|tojson }})</tool_call>{% endfor %}"
    "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ '\n' }}"
    "{% endfor %}{% if tools %}{{ tools|length }} tools{{ '\n' }}{% endif %}"
    "{% if enable_thinking %}think{{ '\n' }}{% endif %}assistant:"
)
WEATHER = {
    "name": "weather",
    "description": "The weather of a place",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
USER = {"role": "user", "content": "How is the weather?"}


@pytest.fixture(scope="module")
def running():
    made = Running(chat_template=TOOLS_TEMPLATE)
    yield made
    made.close()


@pytest.fixture
def client(running):
    made = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
    yield made
    made.close()


@pytest.fixture
def writes(running, monkeypatch):
    """Let the model write a given text, token by token, and then end its turn."""

    def script(text):
        def sampler(args, tokenizer):
            ids = tokenizer.encode(text, add_special_tokens=False)
            ids = iter([*ids, *tokenizer.eos_token_ids])
            return lambda logprobs: mx.array([next(ids, 0)])

        monkeypatch.setattr(host_server, "_make_sampler", sampler)

    return script


@pytest.fixture
def prompts(running, monkeypatch):
    """The texts of prompts as the model gets them."""
    seen = []
    real = running.generator._prompt_of

    def tokens_of(tokenizer, request, args):
        tokenized = real(tokenizer, request, args)
        seen.append(tokenizer.decode(tokenized[0]))
        return tokenized

    monkeypatch.setattr(running.generator, "_prompt_of", tokens_of)
    return seen


def ask(client, **fields):
    """A message of 12 tokens at most; what newer clients do not name goes beside."""
    sampling = {"temperature": 0, **fields}
    beside = {n: sampling.pop(n) for n in ("temperature", "top_k") if n in sampling}
    given = {"model": "default_model", "max_tokens": 12, "messages": [USER], **sampling}
    return client.messages.create(**given, extra_body=beside)


def test_a_message_is_the_chat_completions_text(running, client):
    messages = [{"role": "user", "content": STORY}]
    plain = running.chat([{"role": "system", "content": "Be brief."}, *messages])
    answer = ask(client, system="Be brief.", messages=messages)
    assert answer.content[0].text == plain.choices[0].message.content
    assert answer.stop_reason == "max_tokens"
    assert answer.role == "assistant"
    usage = answer.usage
    assert usage.output_tokens == 12
    assert usage.cache_read_input_tokens > 0.9 * plain.usage.prompt_tokens
    assert (
        usage.input_tokens + usage.cache_read_input_tokens == plain.usage.prompt_tokens
    )


def test_a_streamed_message_is_the_whole_one(client):
    fields = {
        "model": "default_model",
        "max_tokens": 12,
        "messages": [USER],
    }
    whole = ask(client)
    with client.messages.stream(**fields) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 5
    assert "".join(pieces) == whole.content[0].text == final.content[0].text
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 12


def test_a_tool_is_used_whole_and_streamed(running, client, writes):
    writes("I see. " + CALL)
    answer = ask(client, tools=[WEATHER], max_tokens=80)
    with client.messages.stream(
        model="default_model", max_tokens=80, messages=[USER], tools=[WEATHER]
    ) as stream:
        final = stream.get_final_message()
    for got in (answer, final):
        assert [block.type for block in got.content] == ["text", "tool_use"]
        assert got.content[0].text == "I see. "
        assert got.content[1].name == "weather"
        assert got.content[1].input == {"place": "Rome"}
        assert got.stop_reason == "tool_use"
    writes(CALL)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    plain = running.chat([USER], tools=[tool], max_tokens=80)
    assert plain.choices[0].finish_reason == "tool_calls"
    (call,) = plain.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"place": "Rome"}
    pieces = running.chat([USER], tools=[tool], max_tokens=80, stream=True)
    deltas = [piece.choices[0] for piece in pieces]
    (call,) = [call for d in deltas for call in d.delta.tool_calls or []]
    assert (call.index, call.function.name) == (0, "weather")
    assert deltas[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{not JSON</tool_call>",
        "<tool_call>[1, 2]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "argum',
    ],
)
def test_a_call_that_cannot_be_read_is_text(running, client, writes, text):
    """Nothing that the model wrote is lost, and the server answers on."""
    writes(text)
    answer = ask(client, tools=[WEATHER], max_tokens=80)
    inside = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert inside in answer.content[0].text
    assert running.is_well()


def test_a_turn_with_results_is_said_to_the_template(client, prompts):
    ask(
        client,
        system=[{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
        tools=[WEATHER],
        messages=[
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Ask.", "signature": ""},
                    {"type": "text", "text": "Let me see."},
                    {
                        "type": "tool_use",
                        "id": "t1",
                        "name": "weather",
                        "input": {"place": "Rome"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "Sun"},
                    {"type": "text", "text": "And in Oslo?"},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "no such place"}],
                    }
                ],
            },
        ],
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert prompts[-1] == (
        "system: One.\n\nTwo.\n"
        "user: How is the weather?\n"
        'assistant: Let me see.<tool_call>weather({"place": "Rome"})</tool_call>'
        "[Ask.]\n"
        "tool: Sun\n"
        "user: And in Oslo?\n"
        "tool: Error: no such place\n"
        "1 tools\nthink\nassistant:"
    )


PIXEL = "aGVsbG8="
#: A tool's result with an image, in either form.
SHOWN = [
    {"type": "text", "text": "A map:"},
    {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
    },
]
AS_OPENAI = [
    SHOWN[0],
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
]


def test_an_image_of_a_tool_is_a_note_to_who_cannot_see(running, client, prompts):
    result = {"type": "tool_result", "tool_use_id": "t1", "content": SHOWN}
    failed = {**result, "is_error": True}
    ask(client, messages=[USER, {"role": "user", "content": [result, failed]}])
    said = "A map:\n[image omitted]\n"
    assert prompts[-1].endswith(f"tool: {said}tool: Error: \n{said}assistant:")
    tool = {"role": "tool", "tool_call_id": "t1", "content": AS_OPENAI}
    running.chat([USER, tool])
    assert prompts[-1].endswith(f"tool: {said}assistant:")
    # The user's own is refused, since that is what the question is about.
    with pytest.raises(openai.BadRequestError, match="takes no images"):
        running.chat([{"role": "user", "content": AS_OPENAI}])


@pytest.mark.parametrize("takes_them", [True, False])
def test_who_sees_gets_images_of_tools(takes_them):
    """Where the template has a place for them."""

    class Template:
        def apply_chat_template(self, messages, tokenize):
            content = messages[-1]["content"]
            if isinstance(content, list) and not takes_them:
                raise TypeError("a result is a text")
            return "<image>"

    processor = types.SimpleNamespace(image_token="<image>")
    (_, image), end = AS_OPENAI, {"role": "assistant", "content": "I see"}
    tool = {"role": "tool", "content": AS_OPENAI}
    talk = [USER, *(dict(tool) for _ in range(2)), end, USER, dict(tool)]
    tool_images.place(talk, Template(), processor)
    if takes_them:
        assert talk == [USER, tool, tool, end, USER, tool]
        return
    told = {"role": "tool", "content": "A map:\n[image below]"}
    both, one = ({"role": "user", "content": [image] * count} for count in (2, 1))
    assert talk == [USER, told, told, both, end, USER, told, one]


def test_a_note_to_anthropics_billing_is_not_for_the_model(running, client, prompts):
    note = "x-anthropic-billing-header: cc_version=2.1; cch={};"
    for system in (
        [{"type": "text", "text": note}, {"type": "text", "text": "Be brief."}],
        note + "\nBe brief.",
        "Be brief.",
    ):
        for count in (1, 2):
            told = json.loads(json.dumps(system).replace("{}", str(count)))
            ask(client, system=told, messages=[{"role": "user", "content": "Hi"}])
    assert len(prompts) == 6
    assert len(set(map(str, prompts))) == 1


def test_documents_are_their_text_or_a_note(running, client, prompts):
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    plain = {"type": "text", "media_type": "text/plain", "data": "A note."}
    result = [
        {"type": "document", "source": plain},
        {"type": "document", "source": pdf},
        {"type": "tool_reference", "tool_name": "find"},
    ]
    messages = [
        {"role": "user", "content": [{"type": "document", "source": plain}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "a", "name": "read", "input": {}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": result},
                {"type": "document", "source": pdf},
            ],
        },
    ]
    ask(client, messages=messages)
    (said,) = prompts
    assert "A note." in said
    assert "A note.\n[document omitted]\n[tool find]" in said
    assert said.count("[document omitted]") == 2
    image = {"type": "image", "source": plain}
    with pytest.raises(anthropic.BadRequestError, match="an image by text"):
        ask(client, messages=[{"role": "user", "content": [image]}])


def test_tokens_are_counted_without_generating(running, client):
    counted = client.messages.count_tokens(
        model="default_model", messages=[USER], tools=[WEATHER]
    )
    answer = ask(client, tools=[WEATHER])
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert not running.generator.open_tickets()


def test_a_stop_sequence_is_named(client, writes):
    writes("one two three")
    answer = ask(client, stop_sequences=[" two"], max_tokens=50)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " two")
    assert answer.content[0].text == "one"
    writes("one")
    answer = ask(client, stop_sequences=[" two"], max_tokens=50)
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)


REFUSED = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 2}, "temperature"),
    ({"top_k": 1 << 20}, "top_k is 1048576; the model has 16384 tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "'user', 'assistant'"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "format"),
    ({"messages": [USER, {"role": "assistant", "content": "It is"}]}, "be begun"),
    ({"stop_sequences": [5]}, "stop_sequences"),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "messages.0.content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0 has no text",
    ),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED, ids=str)
def test_wrong_messages_are_refused_in_anthropics_form(running, client, fields, says):
    with pytest.raises(anthropic.BadRequestError, match="invalid_request_error") as got:
        ask(client, **fields)
    assert says in got.value.body["error"]["message"]
    assert got.value.body["type"] == "error"
    assert running.is_well()


def test_an_unknown_model_and_a_full_queue_in_anthropics_form(running, client):
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        ask(client, model="claude-of-yesterday")
    before = running.service._limits
    running.service._limits = type(before)(max_waiting=0)
    try:
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error") as got:
            ask(client)
    finally:
        running.service._limits = before
    assert got.value.status_code == 529
    assert got.value.response.headers["retry-after"] == "2"


def test_a_client_that_leaves_a_stream_frees_its_row(running, client):
    with contextlib.closing(
        client.messages.create(
            model="default_model", max_tokens=6000, messages=[USER], stream=True
        )
    ) as stream:
        for _ in range(5):
            next(stream)
    until(lambda: not running.generator.open_tickets())
    assert running.is_well()

"""What is read again of texts that begin alike: the index, places, and an agent."""

import copy
import logging
import threading
import time

import agents
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache
from serving_tools import options

from mlx_turboquant.conversations import PrefixIndex, spread, stops
from mlx_turboquant.conversations.index import as_tokens, common_length
from mlx_turboquant.conversations.snapshots import CLOSE
from mlx_turboquant.errors import UnsupportedError
from mlx_turboquant.integrations import reading, server
from mlx_turboquant.integrations.kept_places import first_to_go
from mlx_turboquant.integrations.places import parts_of
from mlx_turboquant.integrations.prompt_store import MAX_PLACES, KeptText, PromptStore
from mlx_turboquant.spec import CacheSpec

SPEC = CacheSpec.parse("k8v8,page=32,window=8")

texts = st.lists(st.integers(0, 2), max_size=12).map(as_tokens)


@given(st.lists(texts, max_size=8), texts, st.lists(st.integers(0, 7), max_size=4))
def test_the_index_finds_what_comparing_all_would(kept, text, gone):
    index = PrefixIndex(block=3)
    for one in kept:
        index.add("m", one, one)
    for i in gone:
        if i < len(kept):
            index.remove("m", kept[i])
    left = [one for i, one in enumerate(kept) if i not in gone]
    # Removing one of two equal texts removes the text.
    removed = {kept[i].tobytes() for i in gone if i < len(kept)}
    left = [one for one in left if one.tobytes() not in removed]
    best = max((common_length(one, text) for one in left), default=0)
    length, found = index.longest("m", text, lambda value, common: common)
    assert length == best == index.in_common("m", text)
    assert best == 0 or common_length(found, text) == best
    whole = max((len(o) for o in left if common_length(o, text) == len(o)), default=0)
    only_whole = index.longest("m", text, lambda v, n: len(v) if len(v) <= n else 0)
    assert only_whole[0] == whole
    assert index.longest("other", text, lambda value, common: common) == (0, None)
    beginnings = index.beginnings("m", text)
    assert [len(one) for one in beginnings] == sorted(
        {len(o) for o in left if common_length(o, text) == len(o) < len(text)}
    )


@given(st.integers(2, 6000), st.lists(st.integers(0, 6000)), st.integers(0, 5000))
def test_a_place_is_never_far(length, ends, beginning):
    places = stops(length, ends, beginning)
    assert places == sorted(set(places))
    assert places[-1] == length - 1
    assert max(np.diff([0, *places])) <= 1024
    for end in ends:
        if 0 < end < length:
            assert min(abs(end - place) for place in places) < CLOSE


def test_places_given_up_are_old_ones():
    kept = list(range(100, 4000, 50))
    for place in spread(kept, 12):
        kept.remove(place)
    assert len(kept) == 12
    assert (kept[0], kept[-1]) == (100, 3950)
    gaps = np.diff(kept)
    assert list(gaps) == sorted(gaps, reverse=True)
    assert gaps[0] > 10 * gaps[-1]


def test_parts_of_a_template_that_refuses_some():
    def render(messages):
        if len(messages) == 2:
            raise ValueError("roles must alternate")
        return [1, 2, *(len(m["content"]) for m in messages)]

    talk = [{"role": "user", "content": "a" * n} for n in (3, 4, 5)]
    parts = parts_of(render, talk, [1, 2, 3, 4, 5, 9])
    assert parts.ends == (0, 2, 0, 5)
    assert parts.beginning == 2


class Running:
    """A generator of a tiny model in this process."""

    def __init__(self, folder, name, spec=SPEC, template=agents.TEMPLATE, **changes):
        path = agents.save_tiny(name, folder / name)
        given = options(model=str(path), chat_template=template, **changes)
        self.store = PromptStore(given.prompt_cache_size)
        provider = server.Provider(given, spec)
        self.generator = server.Generator(provider, self.store)

    def close(self):
        self.generator.stop_and_join()


@pytest.fixture
def run(tmp_path, hooked):
    made = []

    def start(name, **changes):
        made.append(Running(tmp_path, name, **changes))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "hybrid",
        pytest.param("sliding window", marks=pytest.mark.slow),
        pytest.param("hybrid (mamba)", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_an_agent_reads_nothing_twice(run, name, caplog):
    """Its last answers are those of a server that has read nothing before."""
    caplog.set_level(logging.ERROR)
    running = run(name)
    session = agents.Session(running.generator)
    agents.play(session)
    assert len(session.read) == 34
    assert session.ratio <= 1.05
    assert all(a >= b for a, b in zip(session.read, session.new, strict=True))
    if name == "llama":  # the last token of an answer is not in its cache
        more = [a - b for a, b in zip(session.read, session.new, strict=True)]
        assert max(more) <= 1
        assert sum(more) <= 2
    texts = [entry for entry in running.store._kept if entry.kind == "user"]
    assert len(texts) <= MAX_PLACES * 10


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("hybrid", "IN_TAGS"),
        ("sliding window", "IN_CHANNELS"),
        pytest.param("llama", "IN_TAGS", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "IN_CHANNELS", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_calls_and_channels_are_read_once_too(run, name, template, caplog):
    """Templates shaped as those of models that agents are used with."""
    caplog.set_level(logging.ERROR)
    running = run(name, template=getattr(agents, template))
    session = agents.Session(running.generator)
    agents.play(session, with_calls=True)
    assert len(session.read) == 34
    assert session.ratio <= 1.05
    longest = max((e.tokens for e in running.store._kept), key=len)
    text = running.generator.model_provider.tokenizer.decode(longest.tolist())
    if template == "IN_TAGS":
        assert text.count("<tool_call>\n{") == text.count("</tool_response>") == 21
        assert 0 <= text.count("<think>") < 8  # of the last turn only
    else:
        assert text.count("[call]") == text.count(" to=assistant") == 21
        assert text.count("[channel]analysis") < 8
        assert time.strftime("Today: %Y-") in text


@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_what_is_gone_on_from_is_what_would_be_read(run):
    """From a place in the text, and with the thinking behind it cut."""
    running = run("hybrid")
    session = agents.Session(running.generator, answer_tokens=16)
    talk = [
        {"role": "system", "content": agents.SYSTEM},
        {"role": "user", "content": agents.TURNS[0][0]},
    ]
    first = session.ask(talk)
    talk += [
        {"role": "assistant", "content": f"No. {first}"},
        {"role": "user", "content": "And then?"},
    ]
    again = session.ask(talk)
    assert session.read[1] < session.new[1] + CLOSE < session.read[0] / 2
    fresh = agents.Session(run("hybrid").generator, answer_tokens=16)
    assert fresh.ask(talk) == again
    assert fresh.read[0] > 4 * session.read[1]


@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_what_is_prepared_elsewhere_is_what_the_loop_would_find(run, monkeypatch):
    generator = run("hybrid").generator
    talk = [{"role": "system", "content": agents.SYSTEM}]
    talk.append({"role": "user", "content": [{"type": "text", "text": "Well?"}]})
    asked = [
        server.host_server.CompletionRequest("chat", "", each, agents.TOOLS, None)
        for each in (talk, copy.deepcopy(talk))
    ]
    arguments = agents.arguments(8)
    agents.Session(generator).ask([*talk[:1], {"role": "user", "content": "?"}])
    generator.prepare(asked[0], arguments)
    assert isinstance(talk[1]["content"], list)
    tokenizer = generator.model_provider.tokenizer
    assert asked[0].prepared.tokenizer is tokenizer
    found = [generator._tokenize(tokenizer, one, arguments) for one in asked]
    assert found[0] == found[1]
    assert len(found[0][1]) > 3  # places, not mlx-lm's segments
    assert found[0][2][-1] == "user"
    other = copy.deepcopy(tokenizer)
    monkeypatch.setattr(reading.copy, "deepcopy", None)  # seconds, of two million ids
    tokens = generator._tokens_of_request((None, asked[0], arguments))
    assert tokens.tolist() == found[0][0]
    # Tokens of another tokenizer are not taken.
    asked[0].prepared.tokenized[0].clear()
    assert generator._prompt_of(other, asked[0], arguments)[0] == found[1][0]


def test_one_reads_what_two_begin_with(run, caplog):
    """The second waits for the first one's prompt, and for nothing else."""
    caplog.set_level(logging.ERROR)
    running = run("llama", prefill_step_size=32)
    session = agents.Session(running.generator)
    system = {"role": "system", "content": agents.SYSTEM}
    asked = [[system, {"role": "user", "content": f"{i} is what?"}] for i in range(3)]
    session.ask([{"role": "user", "content": "Hello"}], tools=None)
    threads = [threading.Thread(target=session.ask, args=(one,)) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.read == session.new
    assert sum(session.read[2:]) < session.read[1] / 4
    assert not running.generator._waiting


def test_a_prompt_that_is_given_up_holds_nobody(run, caplog):
    caplog.set_level(logging.ERROR)
    running = run("llama", prefill_step_size=16)
    session = agents.Session(running.generator)
    session.ask([{"role": "user", "content": "Hello"}], tools=None)
    system = {"role": "system", "content": agents.SYSTEM * 4}
    request = server.host_server.CompletionRequest("chat", "", [system], None, None)
    ctx, answers = running.generator.generate(request, agents.arguments(8))
    ctx.stop()
    del ctx, answers
    begun = time.monotonic()
    session.ask([system, {"role": "user", "content": "Well?"}], tools=None)
    assert time.monotonic() - begun < 60


def test_what_was_read_and_dropped_is_read_again(run, caplog):
    caplog.set_level(logging.ERROR)
    running = run("llama")
    session = agents.Session(running.generator)
    talk = [{"role": "user", "content": agents.SYSTEM}]
    running.store.max_bytes = 1
    first = session.ask(talk, tools=None)
    assert session.ask(talk, tools=None) == first
    assert session.read[0] == session.read[1]


def test_what_cannot_go_back_says_so(run, caplog):
    caplog.set_level(logging.INFO)
    running = run("sliding window")
    session = agents.Session(running.generator)
    talk = [{"role": "user", "content": agents.SYSTEM * 3 + "Yes"}]
    session.ask(talk, tools=None)
    (whole,) = (entry for entry in running.store._kept if entry.kind == "assistant")
    kept = KeptText("m", whole.tokens, whole.caches)
    assert kept.usable(len(whole.tokens)) == len(whole.tokens)
    assert kept.usable(len(whole.tokens) - 1) == 0
    with pytest.raises(UnsupportedError, match=r"RotatingTurbo.* cannot go back to 9"):
        kept.fork(9)
    running.store._index = PrefixIndex()  # as if its places had been dropped
    running.store._index.add(whole.model, whole.tokens, whole)
    session.ask([{"role": "user", "content": agents.SYSTEM * 3 + "No"}], tools=None)
    assert "cannot go back to where the texts part" in caplog.text


def test_where_bytes_are_short_places_go_before_texts():
    """Of two texts; the system prompt's stay until a text is alone."""
    index, kept = PrefixIndex(), []

    def keep(text, length, kind, used):
        entry = KeptText("m", text[:length], [ArraysCache(1)], kind, used)
        index.add("m", entry.tokens, entry)
        kept.append(entry)

    first, second = np.zeros(2000, np.int32), np.ones(2000, np.int32)
    second[:600] = 0
    for length, kind, used in (
        *((300, "system", 2), (600, "system", 2), (900, "user", 1)),
        *((1000, "user", 1), (1500, "user", 1), (1900, "user", 1)),
        (2000, "assistant", 1),
    ):
        keep(first, length, kind, used)
    for length, kind in (1700, "user"), (1800, "user"), (1900, "assistant"):
        keep(second, length, kind, 2)
    gone = []
    while kept:
        entry = first_to_go(kept, lambda one: index.beginnings("m", one.tokens))
        index.remove("m", entry.tokens)
        kept.remove(entry)
        gone.append((int(entry.tokens[-1]), len(entry.tokens)))
    assert gone == [
        # Places, the first text's before the other's, until each has one.
        *((0, 1000), (0, 900), (0, 1500), (1, 1800)),
        *((0, 2000), (0, 1900)),  # the first text
        # Of the latest, its end last, and of its system prompt two places until then.
        *((0, 300), (0, 600), (1, 1700), (1, 1900)),
    ]

"""Long chats: what is read, kept, saved and gone on from."""

import json

import agents
import mlx.core as mx
import pytest
from helpers import MODEL
from mlx_lm.models.cache import ArraysCache

import mlx_turboquant as tq
from mlx_turboquant.errors import FormatError, SpecError, UnsupportedError
from mlx_turboquant.integrations.conversation import Conversation
from mlx_turboquant.integrations.stock import length_of, stock_caches

STORY = "The old man looked at the sea and thought of the years that had gone. " * 4
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def make(books, hooked):
    """Makes a chat; with a template unless told otherwise."""
    model, _ = books

    def made(spec="8,window=8,page=32", template=TEMPLATE, **options):
        config = {"chat_template": template} if template else {}
        tokenizer = tq.load(str(MODEL), tokenizer_config=config)[1]

        def cache():
            if spec is None:
                return stock_caches(model)
            return tq.make_prompt_cache(model, spec)

        return Conversation(model, tokenizer, cache, name="books", **options)

    return made


def answer(talk, text, count=10):
    responses = list(talk.say(text, max_tokens=count))
    return "".join(r.text for r in responses), responses[-1].prompt_tokens


@pytest.mark.parametrize("spec", [None, "8,window=8,page=32"])
def test_a_turn_reads_only_what_is_new(make, spec):
    talk = make(spec)
    _, first = answer(talk, STORY)
    _, second = answer(talk, "And then?")
    assert second < first / 2
    assert talk.tokens > first + 10
    assert length_of(talk.cache) == talk.tokens
    roles = [message["role"] for message in talk.messages]
    assert roles == ["user", "assistant"] * 2


def test_it_says_what_one_long_prompt_would(make):
    """The cache follows the text, whatever was kept of it."""
    talk = make(None)
    first, _ = answer(talk, STORY)
    second, _ = answer(talk, "And then?")
    fresh = make(None)
    fresh.messages = [
        {"role": "user", "content": STORY},
        {"role": "assistant", "content": first},
    ]
    assert answer(fresh, "And then?")[0] == second


def test_without_a_template_the_text_goes_on(make):
    talk = make(template=None, system="A tale.")
    _, first = answer(talk, STORY)
    _, second = answer(talk, " He said")
    assert second <= 6 < first
    text = talk.tokenizer.decode(talk._text_tokens)
    assert text.startswith("A tale.\n" + STORY)
    assert " He said" in text


def test_a_stopped_answer_is_kept_as_far_as_it_came(make):
    talk = make()
    speech = talk.say(STORY, max_tokens=50)
    said = "".join(next(speech).text for _ in range(5))
    speech.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    assert length_of(talk.cache) == talk.tokens
    assert answer(talk, "Why?")[1] < 30


def test_a_rewritten_past_is_read_again(make):
    """As templates do that drop thoughts: only what still fits is reused."""
    talk = make()
    _, first = answer(talk, STORY)
    talk.messages[0]["content"] = "Another " + STORY
    _, second = answer(talk, "And then?")
    assert second > 0.8 * first
    assert length_of(talk.cache) == talk.tokens


def test_a_cache_that_cannot_go_back_starts_over(make):
    talk = make(None)
    answer(talk, STORY)
    talk.cache.append(ArraysCache(1))
    made = []
    talk._make_cache = lambda: made.append(1) or stock_caches(talk.network)
    talk.messages[0]["content"] = "Another " + STORY
    answer(talk, "And then?")
    assert made == [1]
    assert length_of(talk.cache) == talk.tokens


@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_states_that_cannot_go_back_were_kept_where_turns_end(tmp_path, hooked):
    """A hybrid's chat whose template cuts an answer's thinking."""
    path = agents.save_tiny("hybrid", tmp_path / "hybrid")
    model, tokenizer = tq.load(str(path), tokenizer_config={"chat_template": TEMPLATE})

    def chat():
        def cache():
            return tq.make_prompt_cache(model, "8,window=8,page=32")

        return Conversation(model, tokenizer, cache)

    talk = chat()
    _, first = answer(talk, STORY)
    assert first > 60
    talk.messages[-1]["content"] = "No."
    kept = [dict(message) for message in talk.messages]
    text, second = answer(talk, "And then?")
    assert second < 25
    fresh = chat()
    fresh.messages = kept
    assert answer(fresh, "And then?") == (text, first + second - 1)
    assert length_of(talk.cache) == talk.tokens


def test_saved_and_loaded_it_goes_on_the_same(make, tmp_path):
    talk = make("3,window=8,page=32")
    answer(talk, STORY)
    talk.save(tmp_path / "chat")
    again = make("3,window=8,page=32")
    again.load(tmp_path / "chat")
    assert again.messages == talk.messages
    assert again.tokens == talk.tokens
    assert answer(again, "And then?") == answer(talk, "And then?")


def test_other_files_are_refused_and_change_nothing(make, tmp_path):
    talk = make()
    answer(talk, STORY)
    before = (list(talk.messages), talk.cache, talk.tokens)
    tq.save_prompt_cache(tmp_path / "prompt", talk.cache)
    with pytest.raises(FormatError, match="but no chat"):
        talk.load(tmp_path / "prompt")
    talk.name = "others"
    talk.save(tmp_path / "others")
    talk.name = "books"
    with pytest.raises(FormatError, match=r"'others', not 'books'"):
        talk.load(tmp_path / "others")
    with pytest.raises(FormatError, match="no such file"):
        talk.load(tmp_path / "none")
    assert (talk.messages, talk.cache, talk.tokens) == before


def test_a_turn_beyond_the_context_is_refused_and_not_kept(make):
    talk = make()
    answer(talk, "Hello.")
    before = json.dumps(talk.messages)
    with pytest.raises(UnsupportedError, match=r"context is 8192; /reset"):
        answer(talk, "word " * 8300)
    assert json.dumps(talk.messages) == before
    assert answer(talk, "Still there?")[1] > 0


def test_a_text_without_tokens_is_refused_and_not_kept(make):
    talk = make(template=None)
    with pytest.raises(SpecError, match="has no tokens"):
        answer(talk, "")
    assert talk.messages == []


def test_reset_forgets_all_but_the_system_prompt(make):
    talk = make(system="Be brief.")
    answer(talk, STORY)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert talk.tokens == 0
    assert all(cache.empty() for cache in talk.cache)
    mx.eval([cache.state for cache in talk.cache])

"""The server over loopback, asked by OpenAI's own client and by rude ones."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers import MODEL
from mlx_lm import generate
from serving_tools import SPEC, STORY, Running

import mlx_turboquant as tq
from mlx_turboquant.spec import CacheSpec


@pytest.fixture(scope="module")
def running():
    made = Running()
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(books):
    """What one stream of the same cache writes."""
    model, tokenizer = books

    def write(prompt, count=12):
        cache = tq.make_prompt_cache(model, SPEC)
        return generate(model, tokenizer, prompt, max_tokens=count, prompt_cache=cache)

    return write


def test_completions_are_those_of_a_single_stream(running, alone):
    answer = running.complete(STORY)
    assert answer.choices[0].text == alone(STORY)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert running.generator.model_provider.is_batchable
    layer = running.generator.model_provider.model.make_cache()[0]
    assert type(layer) is tq.TurboQuantCache


def test_concurrent_requests_are_those_of_single_streams(running, alone):
    prompts = [STORY[: 100 + 90 * i] for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(running.complete, prompts))
    assert [a.choices[0].text for a in answers] == [alone(p) for p in prompts]


def test_streaming_gives_the_same_text_piece_by_piece(running):
    whole = running.chat([{"role": "user", "content": STORY}])
    pieces = list(
        running.chat(
            [{"role": "user", "content": STORY}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 5
    assert pieces[-1].usage.completion_tokens == 12


def test_a_second_turn_reads_only_what_is_new(running):
    talk = [{"role": "user", "content": STORY}]
    first = running.chat(talk)
    talk.append({"role": "assistant", "content": first.choices[0].message.content})
    talk.append({"role": "user", "content": "And then?"})
    second = running.chat(talk)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached > 0.8 * first.usage.prompt_tokens
    # What was reused is what would have been read: a fresh server says the same.
    fresh = Running()
    try:
        again = fresh.chat(talk)
        assert again.usage.prompt_tokens_details.cached_tokens == 0
        assert again.choices[0].message.content == second.choices[0].message.content
    finally:
        fresh.close()


def test_a_diverging_prompt_reuses_what_is_shared(running, alone):
    """A longer text is in the cache: it is copied, trimmed, and stays as it was."""
    head = "Chapter one. " + STORY
    running.complete(head + "He went home. The end of it all was near.")
    answer = running.complete(head + "She")
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached > 0.8 * answer.usage.prompt_tokens
    assert answer.choices[0].text == alone(head + "She")
    again = running.complete(head + "He went home. The end of it all was near.")
    assert again.choices[0].text == alone(
        head + "He went home. The end of it all was near."
    )


def test_seeded_requests_are_served_alone(running, alone):
    """mlx-lm does not batch them; the caches must do there too."""
    answer = running.complete(STORY[:300], seed=7)
    assert answer.choices[0].text == alone(STORY[:300])


def test_a_cancelled_stream_leaves_the_others_alone(running, alone):
    prompts, before = [STORY[:200], STORY[:330]], running.generated()
    stream = running.complete(STORY[:250], stream=True, max_tokens=4000)
    with ThreadPoolExecutor(2) as pool:
        rest = pool.map(running.complete, prompts)
        for _ in range(5):
            next(stream)
        stream.close()
        texts = [answer.choices[0].text for answer in rest]
    assert texts == [alone(prompt) for prompt in prompts]
    assert running.complete(prompts[0]).choices[0].text == texts[0]
    running.settled()
    assert running.generated() - before < 2000  # not the 4000 that nobody wants


def test_a_client_that_leaves_while_its_prompt_is_read(running, alone):
    body = json.dumps({"prompt": STORY * 8, "max_tokens": 50, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    connection.request("POST", "/v1/completions", body=body)
    connection.close()
    assert running.complete(STORY[:150]).choices[0].text == alone(STORY[:150])
    assert running.generator.is_healthy


def test_a_prompt_beyond_the_context_is_refused_in_words(running):
    with pytest.raises(openai.BadRequestError, match=r"context is 8192; shorten it"):
        running.complete("word " * 8500)
    assert running.generator.is_healthy


def test_the_byte_budget_is_enforced_in_every_path():
    """Batched and alone; entries that could never fit are not kept either."""
    made = Running(prompt_cache_bytes=6_000_000)
    try:
        most = 0
        for i in range(4):
            made.complete(f"{i} {STORY[:400]}")
            made.complete(f"{i + 100} {STORY[:300]}", seed=1)
            _, nbytes = made.settled()
            most = max(most, nbytes)
            assert nbytes <= 6_000_000
        assert most > 3_000_000
        made.complete(STORY * 4)
        assert made.settled()[1] <= 6_000_000
    finally:
        made.close()


def test_compressed_texts_fit_where_uncompressed_do_not():
    """The point of it: the same budget keeps more texts."""
    kept = {}
    for spec in (None, CacheSpec.parse("2,window=8,page=32")):
        made = Running(spec=spec, prompt_cache_bytes=12_000_000)
        try:
            for i in range(6):
                made.complete(f"{i} {STORY * 2}", max_tokens=1)
            kept[spec], _ = made.settled()
        finally:
            made.close()
    assert kept.pop(None) < 6
    assert set(kept.values()) == {6}


def test_speculative_serving_is_plain_serving():
    """Drafted or not, on a first turn and on one that goes on from its cache."""
    texts = []
    for draft in ({}, {"draft_model": str(MODEL)}):
        made = Running(draft_spec=CacheSpec.parse("4,page=32"), **draft)
        try:
            first = made.complete(STORY, max_tokens=20, seed=1).choices[0].text
            again = made.complete(f"{STORY}{first} Then", max_tokens=20, seed=1)
            assert again.usage.prompt_tokens_details.cached_tokens > 100
            texts.append([first, again.choices[0].text])
            assert made.generator.model_provider.is_batchable == (not draft)
        finally:
            made.close()
    assert texts[0] == texts[1]


def test_without_kv_bits_it_is_mlx_lms_server():
    made = Running(spec=None)
    try:
        made.complete(STORY[:100])
        caches = made.generator.model_provider.model
        assert "make_cache" not in vars(caches)
    finally:
        made.close()

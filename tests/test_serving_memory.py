"""The memory that caches may take: who is let in, who is refused, what makes way."""

import re
import threading

import pytest
from helpers import MODEL
from serving_tools import SPEC, STORY, Running, until

from mlx_turboquant.integrations.admission import Admission
from mlx_turboquant.integrations.footprint import footprint
from mlx_turboquant.integrations.prompt_store import PromptStore
from mlx_turboquant.integrations.tickets import Ticket
from mlx_turboquant.spec import CacheSpec

BUDGET = 6_000_000


@pytest.fixture(scope="module")
def running():
    made = Running(kv_memory=BUDGET)
    yield made
    made.close()


@pytest.fixture(scope="module")
def fits():
    return footprint(str(MODEL)).tokens_in_cache(BUDGET, SPEC)


def read_so_far(running):
    text = running.raw(None, method="GET", path="/metrics")[1].decode()
    return float(re.search(r'tokens_total{kind="prompt_read"} (\S+)', text)[1])


def test_what_plan_says_fits_is_served_and_no_token_more(running, fits, run_cli):
    code, out, _ = run_cli(
        *("plan", str(SPEC), "--model", str(MODEL), "--kv-memory", "6MB")
    )
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith(str(SPEC)))
    assert int(row.split()[-1]) == fits
    prompt = [5] * 40
    before = read_so_far(running)
    status, answer = running.ask(prompt=prompt, max_tokens=fits - 39)
    assert status == 413
    error = answer["error"]
    assert f"{fits} tokens fit in all" in error["message"]
    assert error["code"] == "kv_memory_exceeded"
    status, answer = running.ask(prompt=[5] * (fits + 1), max_tokens=1)
    assert status == 413
    assert read_so_far(running) == before
    stream = running.complete(prompt, max_tokens=fits - 40, stream=True)
    assert next(stream).choices[0].text
    stream.close()


def test_a_request_that_does_not_fit_now_is_told_to_wait(running, fits):
    """And the one that runs is left alone."""
    expected = running.complete(STORY[:200], max_tokens=60).choices[0].text
    got = []
    long = {"max_tokens": fits * 2 // 3, "stream": True}
    stream = running.complete(STORY[:300], **long)
    next(stream)
    status, answer = running.ask(prompt=STORY[:200], max_tokens=fits // 2)
    assert status == 503
    assert answer["error"]["code"] == "kv_memory_in_use"
    assert re.search(
        r"leave .* of 6.0 MB; ask again in 5 s", answer["error"]["message"]
    )
    # A smaller one still fits beside it.
    thread = threading.Thread(
        target=lambda: got.append(running.complete(STORY[:200], max_tokens=60))
    )
    thread.start()
    for _ in range(20):
        next(stream)
    thread.join()
    assert got[0].choices[0].text == expected
    stream.close()
    until(lambda: not running.generator.open_tickets())
    status, _ = running.ask(prompt=STORY[:200], max_tokens=3)
    assert status == 200
    assert running.is_well()


def test_idle_texts_make_way_until_the_answer_has_ended(running, fits):
    """At once, before the prompt is read; what is finished finds its room again."""
    for i in range(4):
        running.complete(f"{i} {STORY}", max_tokens=1)
    running.settled()
    # The server's own store is its thread's.
    store, provider = PromptStore(), running.generator.model_provider
    for entry in running.cache._kept:
        store.insert_cache(
            entry.model, entry.tokens.tolist(), entry.fork(len(entry.tokens))
        )
    kept = store.nbytes
    assert kept > BUDGET // 4
    ticket = Ticket(lambda item: None)
    admission = Admission(BUDGET, store, lambda: [ticket] if ticket.is_open else [])
    admission.admit(ticket, provider, 30, fits - 60)
    assert ticket.reserved <= BUDGET
    assert store.max_bytes == BUDGET - ticket.reserved < kept
    assert store.nbytes <= BUDGET - ticket.reserved
    # mlx-lm says that an answer has ended just before it stores the text.
    ticket.put(None)
    assert store.max_bytes == BUDGET


def test_a_finished_text_is_kept(running, fits):
    """Although nothing was left while it was written."""
    prompt = f"Once {STORY}"
    (end, *_) = running.generator.model_provider.tokenizer.eos_token_ids
    count = running.complete(prompt, max_tokens=1).usage.prompt_tokens
    running.cache.trim_to(n_sequences=0)
    ending = {"logit_bias": {str(end): 100}, "max_tokens": fits - count}
    assert running.complete(prompt, **ending).choices[0].finish_reason == "stop"
    again = running.complete(prompt, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= count - 1


@pytest.mark.parametrize("spec", [None, "3", "auto"])
def test_every_kind_of_cache_is_counted(spec):
    parsed = None if spec is None else CacheSpec.parse(spec)
    counted_as = CacheSpec.parse("3") if spec == "auto" else parsed
    most = footprint(str(MODEL)).tokens_in_cache(3_000_000, counted_as)
    made = Running(spec=parsed, kv_memory=3_000_000)
    try:
        status, answer = made.ask(prompt=[5] * 10, max_tokens=most)
        assert (status, f"{most} tokens fit" in str(answer)) == (413, True)
        assert made.ask(prompt=[5] * 10, max_tokens=3)[0] == 200
    finally:
        made.close()


def test_rows_of_uncompressed_caches_are_as_long_as_the_longest():
    """mlx-lm pads them: a long one beside short ones costs more than itself."""
    model = footprint(str(MODEL))
    short, long = model.cache_bytes(256), model.cache_bytes(2048)
    made = Running(spec=None, kv_memory=long + 2 * short)
    try:
        with made.complete([5] * 10, max_tokens=240, stream=True) as stream:
            next(stream)
            status, answer = made.ask(prompt=[5] * 10, max_tokens=2030)
            assert (status, answer["error"]["code"]) == (503, "kv_memory_in_use")
            assert made.ask(prompt=[5] * 10, max_tokens=240)[0] == 200
    finally:
        made.close()


def test_the_text_that_is_gone_on_from_stays():
    """Its pages are what the next turn needs, and are not counted twice."""
    made = Running(kv_memory=BUDGET)
    try:
        story, cached = STORY * 2, []
        for turn in range(3):
            done = made.complete(story, max_tokens=16)
            cached.append(done.usage.prompt_tokens_details.cached_tokens)
            count = done.usage.prompt_tokens
            made.complete(f"Another {turn}. {STORY[:900]}", max_tokens=4)
            story += done.choices[0].text + " And then he went on. "
        assert made.cache.nbytes > BUDGET // 4
        assert cached[0] == 0
        assert cached[2] > count // 2
    finally:
        made.close()

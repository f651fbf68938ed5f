"""The memory that caches may take: who is let in, who is refused, what makes way."""

import copy
import re
import threading
from types import SimpleNamespace

import agents
import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from helpers import MODEL
from serving_tools import SPEC, STORY, Running, until

import mlx_turboquant as tq
from mlx_turboquant.errors import RequestError
from mlx_turboquant.integrations.admission import Admission
from mlx_turboquant.integrations.footprint import footprint
from mlx_turboquant.integrations.prompt_store import PromptStore
from mlx_turboquant.integrations.sharing import (
    claimed_nbytes,
    held_nbytes,
    nbytes_behind_pages,
)
from mlx_turboquant.integrations.stock import labelled_leaves
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
    prompt = np.arange(30, dtype=np.int32)
    admission.admit(ticket, provider, prompt, fits - 60)
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
    most = footprint(str(MODEL)).tokens_in_cache(BUDGET, counted_as)
    made = Running(spec=parsed, kv_memory=BUDGET)
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
    made = Running(kv_memory=2 * BUDGET)
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


CHUNK = 128


def read(model, caches, tokens):
    for start in range(0, len(tokens), CHUNK):
        part = mx.array(tokens[None, start : start + CHUNK])
        leaves = [leaf for _, leaf in labelled_leaves(caches)]
        mx.eval(model(part, cache=caches), [leaf.state for leaf in leaves])


def held(*prompts):
    """Bytes of prompt caches together, a page that several hold once."""
    return held_nbytes(leaf for one in prompts for _, leaf in labelled_leaves(one))


@pytest.mark.parametrize("name", ["seed_oss", "gemma3_text", "qwen3_next", "falcon_h1"])
@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_a_dropped_text_s_pages_count_as_long_as_somebody_has_them(name, hooked):
    """A text is read and kept; two go on from it, and it is dropped while they run.

    What is counted is at no moment 5% less than what is there (free pages of a window,
    which one that ended has left), or 30% more when both are at their end.
    """
    model = tiny_models.build(name, max_position_embeddings=4096)
    tq.apply(model, spec := CacheSpec.parse("k4v4,page=32,window=8"))
    provider = SimpleNamespace(
        model=model,
        spec=spec,
        draft_model=None,
        model_key="m",
        is_batchable=True,
        cli_args=SimpleNamespace(prefill_step_size=CHUNK),
    )
    tickets, store = [], PromptStore()
    admission = Admission(10**9, store, lambda: [t for t in tickets if t.is_open])
    text = np.random.default_rng(1).integers(0, 96, 1200).astype(np.int32)
    first = model.make_cache()
    read(model, first, text[:900])
    store.insert_cache("m", text[:900].tolist(), first)
    apart = copy.deepcopy(first)
    del first

    def claimed():
        return claimed_nbytes(store._leaves(), store.loans.tables, store.expected())

    def check(*running):
        there = held(*(entry.caches for entry in store._kept), *running)
        counted = claimed() + sum(t.reserved for t in admission._running())
        assert 0.95 * there <= counted
        return counted / there

    def admitted():
        tickets.append(ticket := Ticket(lambda item: None))
        admission.admit(ticket, provider, text, 40)
        caches, rest = store.fetch_nearest_cache("m", text.tolist())
        assert len(rest) == 300
        return ticket, caches

    whole = admission.bytes_of(provider, 1240)
    one, ones = admitted()
    pages = store.loans.nbytes
    assert 0 < one.reserved == whole - pages
    read(model, ones, text[900:])
    check(ones)
    two, twos = admitted()
    assert store.loans.nbytes == pages  # the same ones
    store.trim_to(n_sequences=0)  # the text goes
    assert len(store) == 0
    check(ones, twos)
    assert store.nbytes >= pages
    # Nobody is let in where those pages are.
    admission.budget = 3 * whole - pages - 1
    with pytest.raises(RequestError, match=r"requests that run leave"):
        admission.admit(Ticket(print), provider, text[::-1].copy(), 40)
    read(model, twos, text[900:])
    read(model, twos, np.resize(text, 40))
    read(model, ones, np.resize(text, 40))
    assert check(ones, twos) < 1.3
    # What one has read itself is set aside for it, also where it is kept as well.
    before = claimed()
    all_of_it = [*text.tolist(), *text[:40].tolist()]
    store.insert_cache("m", all_of_it, copy.deepcopy(twos), cache_type="user")
    assert 0 < claimed() - before <= 1.2 * nbytes_behind_pages(twos)
    check(ones, twos)
    store.trim_to(n_sequences=0)
    one.put(None)
    del ones
    assert store.nbytes >= pages
    check(twos)
    two.cancel()
    del twos
    assert store.nbytes == store.loans.nbytes == 0
    # One that is given up before it is let in has nothing for long.
    store.loans.lend(Ticket(print), apart, 900)
    assert store.loans.nbytes == pages
    admission.admit(Ticket(print), provider, text[:9], 1)
    assert store.loans.nbytes == 0


def test_the_guard_counts_a_draft_s_caches(hooked):
    model, draft = (tiny_models.build("seed_oss") for _ in range(2))
    names = {"model_key": "m", "cli_args": SimpleNamespace(prefill_step_size=CHUNK)}
    alone = SimpleNamespace(model=model, spec=None, draft_model=None, **names)
    both = SimpleNamespace(
        model=model,
        spec=None,
        draft_model=draft,
        draft_spec=None,
        **names,
    )
    counted = [
        Admission(10**9, PromptStore(), list).bytes_of(provider, 300)
        for provider in (alone, both)
    ]
    assert counted[1] == 2 * counted[0] > 0


@pytest.mark.parametrize("name", ["sliding window", "hybrid"])
@pytest.mark.filterwarnings("ignore:.*caches stay in the model's dtype")
def test_plan_and_the_guard_agree_token_for_token(tmp_path, name, run_cli, hooked):
    """With windows that a chunk is read into, and with states."""
    path = str(agents.save_tiny(name, tmp_path / "model"))
    code, out, _ = run_cli("plan", "k4v4", "--model", path, "--kv-memory", "1MB")
    assert code == 0
    planned = [int(line.split()[-1]) for line in out.splitlines() if "MB  " in line]
    model, _ = tq.load(path)
    names = {"model": model, "draft_model": None, "model_key": "m"}
    options = SimpleNamespace(prefill_step_size=2048)
    specs, guarded = [None, CacheSpec.parse("k4v4")], []
    for spec in specs:
        if spec is not None:
            tq.apply(model, spec)
        provider = SimpleNamespace(spec=spec, cli_args=options, **names)
        guarded.append(Admission(10**6, PromptStore(), list)._tokens_in(provider))
    assert guarded == planned
    assert 0 < guarded[0] < guarded[1]

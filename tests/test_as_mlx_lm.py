"""What mlx-lm's own tests ask of caches, generation and prompt reuse, asked of ours."""

import copy

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm import batch_generate, stream_generate
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from test_batch import tiny_model

import mlx_turboquant as tq
from mlx_turboquant.errors import FormatError
from mlx_turboquant.integrations.factory import caches_for
from mlx_turboquant.integrations.prompt_store import PromptStore
from mlx_turboquant.integrations.speculation import PairedCaches, check_rewinds

SPEC = "8,window=8,page=32"
PROMPT = mx.array([(7 * i) % 90 + 3 for i in range(100)])


@pytest.fixture
def model(hooked):
    return tiny_model()


def steps(model, prompt, count, cache, **options):
    return [
        token
        for token, _ in generate_step(
            prompt, model, max_tokens=count, prompt_cache=cache, **options
        )
    ]


def offsets(caches):
    return [cache.offset for cache in caches]


# Prompt caches.


@pytest.mark.parametrize("bound", [None, 80])
def test_generation_goes_on_where_it_stopped(model, bound):
    whole = tq.make_prompt_cache(model, SPEC, bound)
    want = steps(model, PROMPT, 12, whole)
    cache = tq.make_prompt_cache(model, SPEC, bound)
    got = steps(model, PROMPT, 5, cache)
    got += steps(model, mx.array(got[-1:]), 7, trimmed(cache))
    assert got == want


def trimmed(cache):
    """Without the token that `generate_step` has fed and mlx-lm feeds again."""
    if can_trim_prompt_cache(cache):
        trim_prompt_cache(cache, offsets(cache)[0] - 104)
    return cache


def test_trimmed_by_what_was_generated_it_says_the_same_again(model):
    cache = tq.make_prompt_cache(model, SPEC)
    steps(model, PROMPT[:-1], 0, cache)
    before = offsets(cache)
    first = steps(model, PROMPT[-1:], 8, cache)
    extra = offsets(cache)[0] - before[0]
    assert trim_prompt_cache(cache, extra) == extra
    assert offsets(cache) == before
    assert steps(model, PROMPT[-1:], 8, cache) == first


def test_a_copy_is_independent(model):
    cache = tq.make_prompt_cache(model, SPEC)
    steps(model, PROMPT[:-1], 0, cache)
    twin = copy.deepcopy(cache)
    want = steps(model, PROMPT[-1:], 8, cache)
    assert offsets(twin) == [99, 99]
    assert steps(model, PROMPT[-1:], 8, twin) == want


@pytest.mark.filterwarnings("ignore:.*caches")
def test_mixed_caches_are_saved_and_resumed(hooked, tmp_path):
    """Recurrent state, windows and codes in one file."""
    for name in ("falcon_h1", "gemma3_text", "lfm2", "deepseek_v3"):
        model = tiny_models.build(name)
        cache = tq.make_prompt_cache(model, "8,window=4,sink=2,page=32")
        steps(model, PROMPT, 0, cache, prefill_step_size=40)
        tq.save_prompt_cache(tmp_path / name, cache)
        again = tq.load_prompt_cache(tmp_path / name, model)
        assert [type(c) for c in again] == [type(c) for c in cache]
        last = mx.array([5])
        assert steps(model, last, 6, again) == steps(model, last, 6, cache)


def test_a_newer_format_is_one_clear_error_and_the_file_stays(model, tmp_path):
    file = tmp_path / "c.safetensors"
    cache = tq.make_prompt_cache(model, SPEC)
    steps(model, PROMPT, 0, cache)
    from mlx_turboquant.cache import state

    known, state.FORMAT_VERSION = state.FORMAT_VERSION, 99
    try:
        tq.save_prompt_cache(file, cache)
    finally:
        state.FORMAT_VERSION = known
    before = file.read_bytes()
    with pytest.raises(FormatError, match=rf"format 99 is not {known}.*update"):
        tq.load_prompt_cache(file, model)
    assert file.read_bytes() == before


# Batches.


def test_rows_end_when_each_has_enough(model, books):
    tq.apply(model, SPEC)
    prompts = [PROMPT[:n].tolist() for n in (60, 9, 33)]
    counts = [3, 15, 8]
    got = batch_generate(
        model, books[1], prompts, max_tokens=counts, return_token_ids=True
    )
    for prompt, count, ids in zip(prompts, counts, got.token_ids, strict=True):
        one = stream_generate(model, books[1], prompt, max_tokens=count)
        assert ids == [step.token for step in one]


def test_rows_join_while_others_decode(model, books):
    """Continuous batching: later prompts meet a batch that is under way."""
    tq.apply(model, SPEC)
    prompts = [PROMPT[:n].tolist() for n in (60, 9, 33, 80)]
    generator = BatchGenerator(model, completion_batch_size=4, prefill_batch_size=2)
    uids, got = [], {}
    for prompt in prompts:
        uids += generator.insert([prompt], max_tokens=[14])
        for _ in range(3):
            for response in generator.next_generated():
                got.setdefault(response.uid, []).append(response.token)
    while responses := generator.next_generated():
        for response in responses:
            got.setdefault(response.uid, []).append(response.token)
    generator.close()
    for uid, prompt in zip(uids, prompts, strict=True):
        one = stream_generate(model, books[1], prompt, max_tokens=14)
        assert got[uid] == [step.token for step in one]


def test_batches_go_on_from_given_caches(model, books):
    tq.apply(model, SPEC)
    heads, tails = (70, 20), ([4, 5, 6], [9])
    caches = []
    for count in heads:
        caches.append(model.make_cache())
        steps(model, PROMPT[:count], 0, caches[-1])
    alone = copy.deepcopy(caches)
    got = batch_generate(
        model, books[1], list(tails), prompt_caches=caches, max_tokens=8,
        return_token_ids=True,
    )  # fmt: skip
    for tail, cache, ids in zip(tails, alone, got.token_ids, strict=True):
        assert ids == steps(model, mx.array(tail), 8, cache)


def test_logits_processors_see_each_rows_tokens(model, books):
    tq.apply(model, SPEC)
    ban = [make_logits_processors({int(i): -1e9}) for i in (3, 4)]
    prompts = [PROMPT[:40].tolist(), PROMPT[:25].tolist()]
    generator = BatchGenerator(model)
    uids = generator.insert(prompts, max_tokens=[6, 6], logits_processors=ban)
    got = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            got[response.uid].append(response.token)
    generator.close()
    for uid, prompt, processors in zip(uids, prompts, ban, strict=True):
        one = stream_generate(
            model, books[1], prompt, max_tokens=6, logits_processors=processors
        )
        assert got[uid] == [step.token for step in one]


# Reuse of prompts.


def kept(model, tokens):
    cache = tq.make_prompt_cache(model, SPEC)
    steps(model, mx.array(tokens), 0, cache)
    return cache


def test_the_nearest_prompt_is_found_copied_and_trimmed(model):
    store = PromptStore(max_size=4)
    text = PROMPT.tolist()
    store.insert_cache("m", text, kept(model, text))
    assert store.nbytes == sum(c.nbytes for c in kept(model, text))
    # The last token is always read: an answer goes on from what it says.
    exact, rest = store.fetch_nearest_cache("m", text)
    assert (offsets(exact), rest) == ([99, 99], text[99:])
    longer, rest = store.fetch_nearest_cache("m", [*text, 1, 2])
    assert (offsets(longer), rest) == ([100, 100], [1, 2])
    cut, rest = store.fetch_nearest_cache("m", [*text[:60], 1, 2])
    assert (offsets(cut), rest) == ([60, 60], [1, 2])
    steps(model, mx.array(rest), 3, cut)
    assert offsets(store.fetch_nearest_cache("m", [*text, 1])[0]) == [100, 100]
    assert store.fetch_nearest_cache("other", text) == (None, text)


def test_a_longer_text_takes_its_prefixes_place(model):
    store = PromptStore(max_size=4)
    text = PROMPT.tolist()
    store.insert_cache("m", text[:50], kept(model, text[:50]))
    store.insert_cache("m", text, kept(model, text))
    assert len(store) == 1


def test_caches_and_tokens_are_kept_in_step(model):
    """Of two models that have seen different numbers of tokens, the shorter counts."""
    text = PROMPT.tolist()
    pair = kept(model, text[:99]) + kept(model, text[:97])
    store = PromptStore()
    store.insert_cache("m", text, pair)
    found, rest = store.fetch_nearest_cache("m", text)
    assert offsets(found) == [97] * 4
    assert rest == text[97:]
    windows = tq.make_prompt_cache(model, SPEC, 80)  # which cannot go back
    steps(model, PROMPT, 0, windows)
    store = PromptStore()
    store.insert_cache("m", text, windows + kept(model, text[:97]))
    assert len(store) == 0


def test_a_budget_drops_the_oldest(model):
    text = PROMPT.tolist()
    one = sum(c.nbytes for c in kept(model, text))
    store = PromptStore(max_bytes=2 * one)
    for first in (1, 2, 3):
        store.insert_cache("m", [first, *text[1:]], kept(model, text))
    assert len(store) == 2
    assert store.nbytes <= 2 * one
    assert store.fetch_nearest_cache("m", [1, *text[1:]])[0] is None


def test_texts_that_begin_alike_count_their_beginning_once(model, hooked):
    """Two answers to one prompt fit where mlx-lm would drop one."""
    tq.apply(model, SPEC)
    text = PROMPT.tolist()
    first = kept(model, text)
    one = sum(c.nbytes for c in first)
    pages = sum(c._tokens.table.nbytes for c in first)
    store = PromptStore(max_bytes=int(1.9 * one))
    store.insert_cache("m", text, first)
    for token in (1, 2):
        again, _ = store.fetch_nearest_cache("m", [*text, token])
        steps(model, mx.array([token]), 0, again)
        store.insert_cache("m", [*text, token], again)
    assert len(store) == 2
    assert one < store.nbytes <= 2 * one - pages + 1000
    del first, again
    store.trim_to(n_sequences=1)
    assert 0.8 * one < store.nbytes <= one
    store.trim_to(n_sequences=0)
    assert store.nbytes == 0


# Speculation.


@pytest.mark.parametrize("target", [None, "8", "3,window=8,page=32"])
@pytest.mark.parametrize("draft", [None, "2,window=8,page=32"])
def test_drafted_text_is_the_plain_text(books, target, draft, hooked):
    model, tokenizer = books

    def cache(spec):
        return caches_for(model, spec)

    prompt = tokenizer.encode("The old man looked at the sea and said to the boy that ")
    options = {"max_tokens": 60}
    plain = stream_generate(
        model, tokenizer, prompt, prompt_cache=cache(target), **options
    )
    want = [step.token for step in plain]
    pair = PairedCaches(cache(target), cache(draft))
    drafted = list(
        stream_generate(
            model, tokenizer, prompt, prompt_cache=pair, draft_model=model,
            num_draft_tokens=3, **options,
        )
    )  # fmt: skip
    assert [step.token for step in drafted] == want
    assert sum(step.from_draft for step in drafted) > 30


def test_speculation_with_windows_is_refused_before_they_forget(model):
    from mlx_turboquant.errors import UnsupportedModelError

    windows = tq.make_prompt_cache(model, SPEC, 80)
    check_rewinds(windows, "model", tokens=80)
    with pytest.raises(UnsupportedModelError, match=r"windows of 80 .* 81 tokens"):
        check_rewinds(windows, "model", tokens=81)
    hybrid = tiny_models.build("falcon_h1")
    with pytest.warns(UserWarning, match="recurrent"):
        caches = tq.make_prompt_cache(hybrid, SPEC)
    with pytest.raises(UnsupportedModelError, match="draft model has a CacheList"):
        check_rewinds(caches, "draft model")


def test_caches_are_split_where_the_targets_end(model):
    """gemma3n has fewer caches than layers, where mlx-lm splits."""
    target, draft = [1, 2, 3], [4]
    pair = PairedCaches(target, draft)
    assert pair[:4] is target
    assert pair[4:] is draft
    assert list(pair) == [1, 2, 3, 4]
    assert pair[3] == 4

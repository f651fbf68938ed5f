"""Batches: every row must be what it would be alone."""

import mlx.core as mx
import pytest
from helpers import attend, relative_error
from mlx_lm import batch_generate, stream_generate
from mlx_lm.models import llama

import mlx_turboquant as tq


def tokens(count, seed, dim=64):
    return mx.random.normal((1, 2, count, dim), key=mx.random.key(seed))


def grow(cache, count, seed):
    if count == 0:
        return cache
    cache.update_and_fetch(tokens(count, seed), tokens(count, seed + 1))
    mx.eval(cache.state)
    return cache


def test_right_padded_prompt_then_steps_equal_single_streams():
    lengths, longest = [150, 40, 97], 150
    alone = [
        grow(tq.TurboQuantCache("k4v4,page=32"), n, i)
        for i, n in enumerate((130, 0, 9))
    ]
    batch = tq.BatchTurboQuantCache.merge(alone)
    q = mx.random.normal((3, 4, longest, 64))
    k, v = (mx.random.normal((3, 2, longest, 64)) for _ in range(2))
    batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    got = []
    for start, stop in ((0, 100), (100, 150)):
        mask = batch.make_mask(stop - start)
        sides = batch.update_and_fetch(k[:, :, start:stop], v[:, :, start:stop])
        got.append(attend(q[:, :, start:stop], *sides, 0.2, mask))
        mx.eval(got[-1], batch.state)
    batch.finalize()
    got = mx.concatenate(got, axis=2)
    assert batch.offset.tolist() == [280, 40, 106]
    for row, (cache, n) in enumerate(zip(alone, lengths, strict=True)):
        want = []
        for start, stop in ((0, min(100, n)), (100, n)):
            if start >= stop:
                continue
            part = (slice(row, row + 1), slice(None), slice(start, stop))
            sides = cache.update_and_fetch(k[part], v[part])
            want.append(attend(q[part], *sides, 0.2, "causal"))
        want = mx.concatenate(want, axis=2)
        assert relative_error(got[row : row + 1, :, :n], want) < 1e-6
        assert mx.all(got[row, :, n:] == 0).item()
    q, k, v = q[:, :, :1], k[:, :, :1], v[:, :, :1]
    step = attend(q, *batch.update_and_fetch(k, v), 0.2, batch.make_mask(1))
    for row, cache in enumerate(alone):
        part = slice(row, row + 1)
        want = attend(q[part], *cache.update_and_fetch(k[part], v[part]), 0.2)
        assert relative_error(step[part], want) < 1e-6


@pytest.mark.parametrize("window", [None, 50])
def test_array_masks_are_right_aligned(window):
    alone = [
        grow(tq.TurboQuantCache("k4v4,page=32"), n, i) for i, n in enumerate((200, 120))
    ]
    batch = tq.BatchTurboQuantCache.merge(alone)
    q = mx.random.normal((2, 4, 12, 64))
    k, v = (mx.random.normal((2, 2, 12, 64)) for _ in range(2))
    mask = batch.make_mask(12, return_array=True, window_size=window)
    assert mask.shape == (2, 1, 12, 212)
    got = attend(q, *batch.update_and_fetch(k, v), 0.2, mask)
    for row, cache in enumerate(alone):
        part = slice(row, row + 1)
        own = cache.make_mask(12, return_array=True, window_size=window)
        want = attend(q[part], *cache.update_and_fetch(k[part], v[part]), 0.2, own)
        assert relative_error(got[part], want) < 1e-6


def test_merge_filter_extend_extract():
    rows = [grow(tq.TurboQuantCache("3,page=32"), n, n) for n in (150, 20, 300)]
    batch = tq.BatchTurboQuantCache.merge(rows)
    batch.filter([2, 0])
    other = tq.BatchTurboQuantCache.merge([rows[1], tq.TurboQuantCache("3,page=32")])
    batch.extend(other)
    assert batch.offset.tolist() == [300, 150, 20, 0]
    taken = batch.extract(1)
    for name, array in taken.state.items():
        if name != "header":
            assert mx.array_equal(array, rows[0].state[name]).item()
    k = mx.random.normal((4, 2, 1, 64))
    batch.update_and_fetch(k, k)
    assert (taken.offset, rows[0].offset, batch.size()) == (150, 150, 301)
    assert batch.trim(1) == 1
    assert batch.offset.tolist() == [300, 150, 20, 0]
    assert batch.nbytes == sum(row.nbytes for row in batch.rows)


def tiny_model():
    """A random Llama: enough layers and heads to go wrong in every way."""
    mx.random.seed(3)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rms_norm_eps=1e-5,
            vocab_size=16384,
        )
    )
    mx.eval(model.parameters())
    return model


def test_mlx_lm_batch_generate_equals_single_streams(books, hooked):
    model, (_, tokenizer) = tiny_model(), books
    tq.apply(model, "k8v8,window=4,page=32")
    prompts = [list(range(3, 3 + n)) for n in (80, 7, 41)]
    options = {"max_tokens": 30, "prefill_step_size": 32}
    got = batch_generate(
        model,
        tokenizer,
        prompts,
        return_prompt_caches=True,
        return_token_ids=True,
        **options,
    )
    for prompt, ids, caches in zip(prompts, got.token_ids, got.caches, strict=True):
        steps = stream_generate(model, tokenizer, prompt, **options)
        assert ids == [step.token for step in steps]
        assert all(type(c) is tq.TurboQuantCache for c in caches)
        assert caches[0].packed_length >= len(prompt) // 16 * 16 - 16
    again = batch_generate(
        model, tokenizer, [[5, 6, 7]] * 3, prompt_caches=got.caches, max_tokens=5
    )
    assert len(again.texts) == 3

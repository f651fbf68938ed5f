"""mlx-vlm's continuous batching over compressed caches, images in every row."""

import types

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: pip install '.[vlm]'")

import support_table
import tiny_vlms
from mlx_vlm.generate import BatchGenerator, generate_step
from tiny_vlms import FAMILIES
from vlm_media import prompt

import mlx_turboquant as tq
from mlx_turboquant.errors import UnsupportedError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*caches")
COUNTS, CHUNK, DECODED = (112, 40, 77), 32, 12


class _Endless:
    """A tokenizer's rule about ends, for a text that has none."""

    def add_eos_token_ids(self, ids):
        pass

    def __call__(self, token):
        return False


_PROCESSOR = types.SimpleNamespace(stopping_criteria=_Endless())


def _masked(ids):
    return {"mask": mx.ones(ids.shape, mx.int32)}


def single(model, medium, count):
    """Greedy tokens behind a prompt, in mlx-vlm's loop for one."""
    ids = prompt(medium, count)
    options = {**_masked(ids), **medium.given, "prefill_step_size": CHUNK}
    rows = generate_step(ids, model, medium.pixels, max_tokens=DECODED, **options)
    return [token for token, _ in rows]


def batched(model, medium, counts=COUNTS, **options):
    """Greedy tokens behind prompts of several lengths, in its loop for many."""
    prompts = [prompt(medium, count) for count in counts]
    given = []
    for ids in prompts:
        features = model.get_input_embeddings(
            ids, medium.pixels, **_masked(ids), **medium.given
        ).to_dict()
        known = {name: value for name, value in features.items() if value is not None}
        given.append({**medium.given, **known})
    options = {"prefill_step_size": CHUNK, "compute_logprobs": False, **options}
    generator = BatchGenerator(model.language_model, _PROCESSOR, **options)
    lists = [ids[0].tolist() for ids in prompts]
    made = {uid: [] for uid in generator.insert(lists, DECODED, prompt_kwargs=given)}
    while generator.has_work:
        for response in generator.next()[1]:
            made[response.uid].append(int(response.token))
    generator.close()
    return list(made.values())


@pytest.mark.parametrize(
    "name", ["aya_vision", "gemma4", "kimi_k25", "lfm2_vl", "pixtral", "qwen2_5_vl"]
)
def test_batches_equal_single_streams(name, hooked):
    """Sliding windows, decoded layers, recurrent states, M-RoPE; rows of any length."""
    model, medium = tiny_vlms.build(name), FAMILIES[name].medium()
    tq.apply(model, support_table.SPEC)
    want = [single(model, medium, count) for count in COUNTS]
    assert batched(model, medium) == want


def test_models_that_take_rows_out_of_a_batch(hooked):
    """Qwen3.5 runs padded rows one by one: refused, but not needed."""
    model, medium = tiny_vlms.build("qwen3_5"), FAMILIES["qwen3_5"].medium()
    tq.apply(model, support_table.SPEC)
    with pytest.raises(UnsupportedModelError, match="one length, or one at a time"):
        batched(model, medium)
    want = [single(model, medium, count) for count in COUNTS]
    assert batched(model, medium, prefill_batch_size=1) == want
    assert batched(model, medium, (77, 77)) == [want[2]] * 2


def test_bits_chosen_from_a_text_are_refused(hooked):
    model, medium = tiny_vlms.build("pixtral"), FAMILIES["pixtral"].medium()
    tq.apply(model, "auto")
    with pytest.raises(UnsupportedError, match="chosen from one text, mlx-vlm's batch"):
        batched(model, medium)
    assert len(single(model, medium, 40)) == DECODED

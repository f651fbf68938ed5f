"""Models of mlx-vlm under its own loop: images, videos, sounds, M-RoPE, refusals."""

import warnings

import mlx.core as mx
import pytest

mlx_vlm = pytest.importorskip(
    "mlx_vlm", reason="mlx-vlm is not installed: pip install '.[vlm]'"
)

import support_table  # noqa: E402
import tiny_vlms  # noqa: E402
import vlm_table  # noqa: E402
from mlx_vlm.generate import generate_step  # noqa: E402
from mlx_vlm.models import base, cache  # noqa: E402
from tiny_vlms import FAMILIES  # noqa: E402
from vlm_media import VOCAB, prompt  # noqa: E402

import mlx_turboquant as tq  # noqa: E402
from mlx_turboquant.errors import UnsupportedError, UnsupportedModelError  # noqa: E402
from mlx_turboquant.integrations import hook, probe, vision  # noqa: E402
from mlx_turboquant.integrations.stock import stock_caches  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*caches")

DOCUMENTED = support_table.parts()[1].splitlines()
SPEC = support_table.SPEC
REFUSED = ("florence2",)
PROMPT, CHUNK, DECODED = 112, 70, 6


def steps(model, caches, medium, count=PROMPT, decoded=DECODED, **options):
    """mlx-vlm's loop behind a prompt of ``count`` tokens: its tokens, and logprobs."""
    return generate_step(
        prompt(medium, PROMPT + DECODED + 1)[:, :count],
        model,
        medium.pixels,
        mx.ones((1, count), mx.int32),
        prompt_cache=caches,
        prefill_step_size=CHUNK,
        max_tokens=decoded,
        **medium.given,
        **options,
    )


def logprobs(model, caches, medium, count=PROMPT, decoded=DECODED, **options):
    """Rows (decoded, VOCAB); the tokens behind ``count`` are the prompt's own."""
    given = iter(prompt(medium, PROMPT + DECODED + 1)[0, count:].tolist())
    sampler = {"sampler": lambda _: mx.array([next(given)])}
    rows = steps(model, caches, medium, count, decoded, **sampler, **options)
    return mx.stack([row for _, row in rows])[:, :VOCAB]


def error(got, want):
    return (mx.sqrt(mx.mean((got - want) ** 2)) / mx.std(want)).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_agree_with_stock(name, hooked):
    model, medium = tiny_vlms.build(name), FAMILIES[name].medium()
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError) as caught:
            tq.make_prompt_cache(model, SPEC)
        assert support_table.refusal(name, caught.value) in DOCUMENTED
        return
    caches = tq.make_prompt_cache(model, SPEC)
    got = logprobs(model, caches, medium)
    want = logprobs(model, stock_caches(model), medium)
    assert 0 < error(got, want) < 0.01
    title = vlm_table.name_in_table(name)
    assert support_table.row(title, caches) in DOCUMENTED, (
        "docs/models.md is not true any more; run python tests/vlm_table.py"
    )
    for layer in tq.explain(caches).layers:
        if layer.spec:  # something was packed, or all of this says nothing
            assert layer.tokens[1] > 0
    if medium.pixels is not None or medium.given:  # and it is seen
        assert error(logprobs(model, stock_caches(model), medium.other()), want) > 1e-3


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_a_decode_step_is_what_a_longer_prompt_gives(name, hooked):
    """Positions of images (M-RoPE) and masks are those of mlx-vlm's own caches."""
    model, medium = tiny_vlms.build(name), FAMILIES[name].medium()

    def differ(make):
        stepped = logprobs(model, make(), medium, PROMPT, 2)[1:]
        return error(stepped, logprobs(model, make(), medium, PROMPT + 1, 1))

    ours = differ(lambda: tq.make_prompt_cache(model, SPEC))
    # Not zero where prompts attend both ways (paligemma), nor in gemma3n.
    assert ours < 1.1 * differ(lambda: stock_caches(model)) + 1e-3


def test_the_table_has_every_family_once():
    lines = [line for line in DOCUMENTED if line.startswith("| ")]
    names = [support_table.name_of(line) for line in lines]
    assert names[1:] == sorted(vlm_table.name_in_table(name) for name in FAMILIES)
    assert len({name.partition(":")[0] for name in FAMILIES}) >= 12


@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl", "qwen3_5"])
def test_apply_gives_the_loop_compressed_caches_unasked(name, hooked):
    model, medium = tiny_vlms.build(name), FAMILIES[name].medium()
    want = [token for token, _ in steps(model, None, medium, decoded=20)]
    made = tq.apply(model, SPEC)
    caches = cache.make_prompt_cache(model.language_model)
    assert [token for token, _ in steps(model, None, medium, decoded=20)] == want
    assert [token for token, _ in steps(model, caches, medium, decoded=20)] == want
    assert tq.explain(caches).packed_layers == made.packed_layers > 0


def test_uninstall_puts_mlx_vlm_back(hooked):
    from mlx_vlm.models.qwen2_5_vl import language

    model = tiny_vlms.build("qwen2_5_vl")
    tq.apply(model, SPEC)
    stock = base.scaled_dot_product_attention
    assert language.scaled_dot_product_attention is hook.attend_or(stock)
    tq.uninstall()
    assert language.scaled_dot_product_attention is stock
    made = cache.make_prompt_cache(model.language_model)
    assert {type(layer) for layer in made} == {cache.KVCache}


@pytest.mark.parametrize("name", ["glm4v", "minicpmo", "qwen2_5_vl", "qwen3_5"])
def test_a_dry_run_does_not_move_the_images_of_a_text_under_way(name, hooked):
    """Models note where a prompt's images put its tokens; a dry run has none."""
    model, medium = tiny_vlms.build(name), FAMILIES[name].medium()
    tq.make_prompt_cache(model, SPEC)

    def disturbed(is_disturbed):
        caches = tq.make_prompt_cache(model, SPEC)
        rows = steps(model, caches, medium, sampler=lambda _: mx.array([7]))
        first = next(rows)[1]
        if is_disturbed:
            probe.forget()
            tq.make_prompt_cache(model, SPEC)
        return mx.stack([first, *(row for _, row in rows)])

    assert mx.array_equal(disturbed(True), disturbed(False))


def test_a_language_model_alone_is_enough(hooked):
    """As a server passes it; and it may outlive the model that it is a part of."""
    model = tiny_vlms.build("qwen2_5_vl").language_model
    assert tq.apply(model, SPEC).packed_layers == 4
    whole = tiny_vlms.build("qwen2_5_vl")
    part = whole.language_model
    tq.apply(whole, SPEC)
    del whole
    assert tq.explain(part.make_cache()).packed_layers == 4


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 4},
        {"kv_bits": 3.5},
        {"kv_bits": 4, "kv_quant_scheme": "turboquant"},
        {"kv_bits": 8, "kv_key_scheme": "turboquant", "kv_value_scheme": "uniform"},
    ],
)
def test_mlx_vlms_own_quantization_leaves_ours_alone(options, hooked):
    model, medium = tiny_vlms.build("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].medium()
    want = logprobs(model, tq.make_prompt_cache(model, SPEC), medium)
    caches = tq.make_prompt_cache(model, SPEC)
    options = {**options, "quantized_kv_start": 0, "kv_group_size": 16}
    assert mx.array_equal(logprobs(model, caches, medium, **options), want)
    assert {type(layer) for layer in caches} == {tq.TurboQuantCache}


def test_bounded_caches_agree_with_stock(hooked):
    model, medium = tiny_vlms.build("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].medium()
    stock = stock_caches(model, 80)
    assert {type(layer) for layer in stock} == {cache.RotatingKVCache}
    caches = tq.make_prompt_cache(model, SPEC, max_kv_size=80)
    got, want = (logprobs(model, made, medium) for made in (caches, stock))
    assert 0 < error(got, want) < 0.01
    assert {type(layer) for layer in caches} == {tq.RotatingTurboQuantCache}


def test_what_cannot_be_done_is_said(hooked, tmp_path):
    model = tiny_vlms.build("qwen2_5_vl")
    with pytest.raises(UnsupportedModelError, match="not compiled: positions"):
        tq.compiled(model)
    caches = tq.make_prompt_cache(model, SPEC)
    with pytest.raises(UnsupportedError, match="cannot be saved: the positions of im"):
        tq.save_prompt_cache(tmp_path / "prompt", caches)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"2 of 4 .* ArraysCache \(recurrent state"):
        tq.make_prompt_cache(tiny_vlms.build("qwen3_5"), SPEC)
    with pytest.warns(UserWarning, match="phi3_v computes attention itself"):
        tq.make_prompt_cache(tiny_vlms.build("phi3_v"), SPEC)


def test_models_of_mlx_lm_are_none_of_mlx_vlms(books):
    model, _ = books
    assert not vision.is_vision_model(model)
    assert vision.language_model(model) is model
    with warnings.catch_warnings(action="error"):
        caches = tq.make_prompt_cache(model, "3")
    assert tq.explain(caches).packed_layers == len(caches)

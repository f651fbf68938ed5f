"""``mlx_tq.generate --image``: a tiny Qwen2.5-VL on disk, its processor, and errors."""

import json

import mlx.core as mx
import pytest

from mlx_turboquant.errors import UnsupportedError
from mlx_turboquant.integrations import vision_loop

NEEDS_MLX_VLM = pytest.mark.skipif(
    not vision_loop.is_installed(),
    reason="mlx-vlm is not installed: pip install '.[vlm]'",
)
#: Of the tokenizer: 256 bytes, then these.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen2.5-VL with a tokenizer of bytes, as hubs have them."""
    import tiny_vlms
    from mlx.utils import tree_flatten
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("qwen")
    ids = {name: 256 + index for index, name in enumerate(SPECIAL)}
    config = tiny_vlms.config("qwen2_5_vl")
    config.update(
        vocab_size=263,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        max_position_embeddings=2048,
    )
    config["text_config"].update(vocab_size=263, max_position_embeddings=2048)
    model = tiny_vlms.build("qwen2_5_vl", config)
    (path / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": TEMPLATE,
        },
        "preprocessor_config.json": {
            "patch_size": 4,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "min_pixels": 64,
            "max_pixels": 4096,
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Paths of two images, 32 by 16 pixels: 8 tokens each."""
    from PIL import Image

    paths = []
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        paths.append(str(tmp_path_factory.mktemp("images") / f"{name}.png"))
        Image.new("RGB", (32, 16), color).save(paths[-1])
    return paths


@NEEDS_MLX_VLM
def test_answers_about_images_from_compressed_caches(folder, picture, run_cli):
    red, blue = picture
    model = ["generate", "--model", str(folder), "--prompt", "what is this?" * 20]
    model += ["--max-tokens", "40", "--kv-bits", "8,page=32,window=4"]
    model += ["--temp", "1", "--seed", "3"]
    code, out, err = run_cli(*model, "--image", red)
    assert code == 0, err
    assert "weights are loaded as float32" in err
    assert "KV cache: " in out
    assert "k8v8,window=4,page=32 in 4 of 4 layers" in out
    # 260 letters, 8 of the image, 2 around it, 3 marks, "user\n", "\n", "assistant".
    assert "Prompt: 288 tokens" in out
    answer = out.partition("==========")[0]
    assert answer.strip()
    same = run_cli(*model, "--image", red)[1]
    assert same.partition("==========")[0] == answer
    assert run_cli(*model, "--image", blue)[1].partition("==========")[0] != answer
    both = run_cli(*model, "--image", red, "--image", blue)[1]
    assert "Prompt: 298 tokens" in both


@NEEDS_MLX_VLM
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draft-model", "x"], "--draft-model does not go with --image"),
        (["--prefill-response", "It"], "--prefill-response does not go with --image"),
        (["--prompt-cache-file", "x"], "--prompt-cache-file does not go with --image"),
        (["--image", "nowhere.png"], "--image 'nowhere.png' cannot be read"),
        (["--ignore-chat-template"], "no place for the image; leave --ignore-chat"),
        (["--ignore-chat-template", "-p", "<|image_pad|>" * 2], "do not go together"),
        (["--model", "nowhere"], "mlx-vlm cannot load model 'nowhere'"),
    ],
)
def test_errors_are_one_line(folder, picture, run_cli, options, words):
    model = ["--model", str(folder), "--image", picture[0]]
    code, out, err = run_cli("generate", *model, *options)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in err


@NEEDS_MLX_VLM
def test_a_text_alone_goes_through_mlx_vlm_too(folder, picture):
    """Greedy, and ended by a token of the user's choice."""
    from mlx_turboquant.cli.pictures import PictureSession

    def tokens_of(images, **options):
        session = PictureSession(str(folder), is_verbose=False, **options)
        opened = [vision_loop.open_image(source) for source in images]
        inputs = session.inputs("hello " * 9, opened, "Be brief.")
        steps = session.stream(inputs, session.sampler(), max_tokens=30)
        return inputs.tokens, [step.token for step in steps]

    (text, said), (pictured, _) = tokens_of(()), tokens_of(picture)
    assert len(pictured) == len(text) + 20
    last = max(said, key=said.index)
    ended = tokens_of((), extra_eos_tokens=[str(last)])[1]
    assert ended[: said.index(last)] == said[: said.index(last)]
    assert len(ended) == said.index(last) + 1 < len(said)


@NEEDS_MLX_VLM
def test_which_models_need_mlx_vlm(folder, tmp_path):
    assert not vision_loop.has_no_other(str(tmp_path))
    for kind, only in (("llama", False), ("internvl_chat", True), ("nonsense", False)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        assert vision_loop.has_no_other(str(tmp_path)) == only
    (tmp_path / "config.json").write_text("[]")
    assert not vision_loop.has_no_other(str(tmp_path))


def test_without_mlx_vlm_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(vision_loop, "is_installed", lambda: False)
    with pytest.raises(UnsupportedError, match=r"pip install 'mlx-tq\[vlm\]'"):
        vision_loop.load("any")
    with pytest.raises(UnsupportedError, match=r"images need mlx-vlm, which is not"):
        vision_loop.open_image("any.png")

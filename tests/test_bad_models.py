"""Model folders that are none: each ends in one line, and none in a crash."""

import json
import os
import pkgutil
import socket
import types

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_folder
from helpers import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import models
from mlx_lm.models import llama
from tiny_folder import CONFIG, WORDS
from typer.testing import CliRunner

import mlx_turboquant as tq
from mlx_turboquant.cli import app
from mlx_turboquant.errors import UnsupportedError, UnsupportedModelError
from mlx_turboquant.integrations import loading, model_folder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The bytes of the files of a folder as it should be."""
    folder = tiny_folder.write(tmp_path_factory.mktemp("base"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(base, tmp_path):
    for name, content in base.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def run(*args, stdin=""):
    """(exit code, output) of a command; nothing but an exit leaves it."""
    result = CliRunner().invoke(app.main, list(args), input=stdin)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result.exit_code, result.output


def generate(folder, *args):
    return run("generate", "--model", str(folder), "-m", "3", "-p", "hello", *args)


def refused(folder):
    """That both commands refuse it in one line, the same one."""
    lines = set()
    for code, out in (generate(folder), run("plan", "--model", str(folder), "3")):
        assert code == 2
        (line,) = (line for line in out.splitlines() if line.startswith("error: "))
        lines.add(line)
    assert len(lines) == 1
    return lines.pop()


def test_the_folder_is_one(folder):
    code, out = generate(folder, "--kv-bits", "3")
    assert code == 0, out
    assert "Generation: " in out
    assert run("plan", "--model", str(folder), "3")[0] == 0


CONFIGS = {
    "list": (b"[]", "config.json is a list, no object"),
    "null": (b"null", "config.json is a NoneType"),
    "number": (b"3", "no object"),
    "text": (b'"llama"', "no object"),
    "empty": (b"", "is not JSON"),
    "half": (b"{", "is not JSON"),
    "binary": (bytes(range(256)), "is not JSON"),
    "odd part": (
        b'{"model_type": "llama", "text_config": [1]}',
        "text_config [1] is no object",
    ),
    "deep": (b"[" * 100_000, "is not JSON"),
    "no type": (b"{}", "has no model_type"),
    "unknown type": (b'{"model_type": "none.such"}', "not supported"),
    "no package": (b'{"model_type": "olmo"}', "(To run olmo install ai2-olmo"),
    "no model": (b'{"model_type": "base"}', "has no attribute"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_no_config_is_refused(case, folder):
    content, says = CONFIGS[case]
    (folder / "config.json").write_bytes(content)
    assert says in refused(folder)


def test_fields_that_are_missing_are_named(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    line = refused(folder)
    assert "(config.json has no hidden_size, num_hidden_layers, " in line
    assert "rms_norm_eps, vocab_size, which ModelArgs needs); give a folder" in line


def test_missing_fields_are_named_for_every_type():
    """Whatever classes mlx-lm has for configs and their parts."""
    named = 0
    for module in pkgutil.iter_modules(models.__path__):
        config = {"model_type": module.name}
        for part in ("text_config", "vision_config"):
            try:
                _, args_class = model_folder.classes_of(config)
            except (AttributeError, ValueError):
                continue  # no model's module
            try:
                args_class.from_dict(config)
            except Exception as error:
                said = model_folder.first_line(error)
                assert "__init__" not in said
                named += said.startswith("config.json has no ")
            config[part] = {}
    assert named > 100


VALUES = {
    "hidden_size": "many",
    "num_attention_heads": 0,
    "num_key_value_heads": -1,
    "num_hidden_layers": 10**12,
    "max_position_embeddings": float("nan"),
    "head_dim": True,
    "vocab_size": 3.5,
    "rms_norm_eps": 0,
    "rope_theta": "x",
    "quantization": [4],
    "intermediate_size": [],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_another_kind_is_named(name, folder):
    config = {**CONFIG, name: VALUES[name]}
    (folder / "config.json").write_text(json.dumps(config))
    assert name in refused(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "text_config": config}))
    assert name in refused(folder)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layers", "depth"])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_more_layers_than_can_be_built_are_refused(name, part, folder):
    """Before one is built: a million take hours."""
    config = CONFIG | ({name: 4097} if part is None else {part: {name: 4097}})
    (folder / "config.json").write_text(json.dumps(config))
    assert f"({name} 4097 is over 4096 layers)" in refused(folder)
    config = CONFIG | ({name: 4096} if part is None else {part: {name: 4096}})
    (folder / "config.json").write_text(json.dumps(config))
    assert model_folder.read_config(folder) == config


def test_sizes_that_crash_mlx_are_refused(folder):
    """A layer of one element, and weights of two groups: MLX divides by zero."""
    for name in ("hidden_size", "intermediate_size"):
        (folder / "config.json").write_text(json.dumps({**CONFIG, name: 1}))
        with pytest.raises(UnsupportedModelError, match="groups of weights are not"):
            tq.load(str(folder))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 7, 64, 10**6, 10**12, 1.5, 1e-300, float("inf")]),
    st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=2),
    st.dictionaries(st.sampled_from(["type", "factor", "bits"]), st.integers(-1, 9)),
)


@settings(max_examples=60)
@given(name=st.sampled_from([*CONFIG, "rope_scaling", "layer_types"]), value=ODD)
def test_any_value_runs_or_is_refused(name, value, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    for file, content in base.items():
        (folder / file).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({**CONFIG, name: value}))
    for code, out in (generate(folder), run("plan", "--model", str(folder), "3")):
        assert (code, "error: " in out) in ((0, False), (2, True)), out


#: Values of every file that is read beside the config and the weights.
FIELDS = {
    "generation_config.json": ("eos_token_id", "bos_token_id", "temperature"),
    "tokenizer_config.json": (
        *("tokenizer_class", "eos_token", "pad_token", "unk_token", "chat_template"),
        *("added_tokens_decoder", "model_max_length", "extra_special_tokens"),
        *("chat_template_type", "tool_parser_type", "auto_map", "padding_side"),
    ),
    "config.json": (
        *("eos_token_id", "tie_word_embeddings", "rope_parameters", "text_config"),
        *("model_file", "quantization_config", "quantize_activations", "auto_map"),
    ),
    "special_tokens_map.json": ("eos_token", "pad_token"),
    "model.safetensors.index.json": ("weight_map", "metadata"),
    "hf_quant_config.json": ("quantization",),
}
PLACES = [(file, field) for file, fields in FIELDS.items() for field in fields]
WILD = ODD | st.sampled_from([10**30, [None], [[]], {"a": 1}, "\ud800", "<end>"])


@settings(max_examples=100)
@given(place=st.sampled_from(PLACES), value=WILD)
def test_any_file_is_read_or_refused(place, value, base, tmp_path_factory):
    file, field = place
    folder = tmp_path_factory.mktemp("any")
    for name, content in base.items():
        (folder / name).write_bytes(content)
    whole = json.loads(base.get(file, b"{}"))
    (folder / file).write_text(json.dumps({**whole, field: value}))
    runs = [generate(folder), run("plan", "--model", str(folder))]
    runs.append(run("chat", "--model", str(folder), "-m", "2", stdin="hello"))
    for code, out in runs:
        assert code in (0, 2)
        assert "error: " in out or code == 0


TOKENIZERS = {
    "empty": b"",
    "half": b"{",
    "list": b"[]",
    "null": b"null",
    "object": b"{}",
    "binary": bytes(range(256)),
    "no model": json.dumps({**tiny_folder.tokenizer(), "model": None}).encode(),
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused(case, name, folder):
    if (case, name) in (("object", "tokenizer_config.json"), ("no model", name)):
        return
    (folder / name).write_bytes(TOKENIZERS[case])
    code, out = generate(folder)
    assert code == 2
    assert "error: cannot load model" in out


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token": ["x"]},
        {"model_max_length": "x"},
        {"chat_template_type": "nosuch"},
        {"tool_parser_type": "nosuch"},
    ],
)
def test_options_of_a_tokenizer_that_fail_are_refused(change, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **change}))
    code, out = generate(folder)
    assert (code, "error: cannot load model" in out) == (2, True)


def test_a_tokenizer_of_another_model_is_refused(folder):
    """Its ids are read from memory that is not the embedding's."""
    tokenizer = tiny_folder.tokenizer(first=10_000)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, out = generate(folder)
    assert code == 2
    assert "has ids up to 10010, its embedding is for 0..31" in out


def test_an_added_token_is_refused_where_it_is_used(folder):
    """Models are used whose tokenizer has padding that they have no row for."""
    more = [f"word{number}" for number in range(CONFIG["vocab_size"] - len(WORDS))]
    tokenizer = tiny_folder.tokenizer([*WORDS, *more])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [
        {"id": 32, "content": "<more>", "special": True, **flags}
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert generate(folder)[0] == 0
    code, out = generate(folder, "-p", "hello <more>")
    assert code == 2
    assert "the prompt has token 32, the model's are 0..31" in out


def test_rows_of_the_embedding():
    network = nn.Module()
    network.args = types.SimpleNamespace(vocab_size=96)
    network.positions, network.tokens = (nn.Embedding(n, 4) for n in (512, 96))
    assert model_folder.embedding_rows(network) == 96
    network.args.vocab_size = 90  # the embedding was made larger
    assert model_folder.embedding_rows(network) == 512
    with pytest.raises(UnsupportedModelError, match=r"token -1, the model's are 0\.\."):
        model_folder.check_tokens(network, [3, -1], "it")


TEMPLATES = {
    "syntax": "{% if %}",
    "raises": "{{ raise_exception('no system role') }}",
    "undefined": "{{ messages.nothing.at.all }}",
    "long": "{% for i in range(10**9) %}x{% endfor %}",
    "number": 3,
    "named": [{"name": "a", "template": "x"}],
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_that_fails_is_one_line(case, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATES[case]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for command in ("generate", "cache_prompt"):
        args = ["--prompt-cache-file", str(folder / "c")]
        args = args if command == "cache_prompt" else ["-m", "2"]
        code, out = run(command, "--model", str(folder), "-p", "hello", *args)
        assert code == 2
        assert out.count("error: the chat template") == 1


BROKEN_WEIGHTS = {
    "missing": None,
    "empty": b"",
    "text": b"hello",
    "huge header": (2**60).to_bytes(8, "little") + b"{}",
    "no weights": (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(case, folder):
    weights = folder / "model.safetensors"
    weights.unlink()
    if BROKEN_WEIGHTS[case] is not None:
        weights.write_bytes(BROKEN_WEIGHTS[case])
    code, out = generate(folder)
    assert (code, "error: cannot load model" in out) == (2, True)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"],
)
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(name, kind, folder):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
        if name == "generation_config.json":
            return  # nobody reads it
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            here = os.getcwd()
            os.chdir(folder)  # a socket's path is short
            bound.bind(name)
            os.chdir(here)
    code, out = generate(folder)
    (line,) = (line for line in out.splitlines() if line.startswith("error: "))
    assert code == 2
    assert "cannot load model" in line
    if kind != "folder":
        assert f"{name}: it is a {kind}, no regular file" in line


# Adapters.

LORA = {"rank": 4, "scale": 1.0, "dropout": 0.0}
ADAPTERS = {
    "whole": ({}, {}, ""),
    "no scale": ({"lora_parameters": {"rank": 4}}, {}, "missing required key 'scale'"),
    "other rank": ({"lora_parameters": {**LORA, "rank": 2}}, {}, "does not match"),
    "other layer": ({}, {"model.layers.7.lora_a": (2, 2)}, "not an adapter parameter"),
    "no config": (None, {}, "adapter_config.json: No such file"),
    "list": ([], {}, "adapter_config.json"),
    "no weights": ({}, None, "adapters.safetensors: No such file"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_error_about_adapters_names_them(case, folder, tmp_path_factory):
    config, weights, says = ADAPTERS[case]
    adapters = tmp_path_factory.mktemp("adapters")
    if config is not None:
        base = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": LORA}
        whole = config if isinstance(config, list) else {**base, **config}
        (adapters / "adapter_config.json").write_text(json.dumps(whole))
    if weights is not None:
        query = "model.layers.1.self_attn.q_proj.lora"
        shapes = {f"{query}_a": (64, 4), f"{query}_b": (4, 128), **weights}
        arrays = {name: mx.zeros(shape) for name, shape in shapes.items()}
        mx.save_safetensors(str(adapters / "adapters.safetensors"), arrays)
    code, out = generate(folder, "--adapter-path", str(adapters))
    lines = [line for line in out.splitlines() if line.startswith("error: ")]
    if not says:
        assert (code, lines) == (0, [])
        return
    assert code == 2
    (line,) = lines
    assert line.startswith(f"error: cannot load adapters {str(adapters)!r}")
    assert says in line
    assert "or leave --adapter-path out" in line


def test_adapters_that_are_no_folder_are_named(folder):
    os.mkfifo(folder / "pipe")
    (folder / "pipe").rename(folder.parent / "pipe")
    for path in ("/nowhere", str(folder.parent / "pipe"), str(folder / "config.json")):
        code, out = generate(folder, "--adapter-path", path)
        assert code == 2
        assert f"error: cannot load adapters {path!r} (adapter_config.json: " in out


# Activations.


@pytest.fixture
def in_mxfp8(folder):
    """The folder with weights that products of quantized activations take."""
    config = {
        **CONFIG,
        "quantization": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    }
    network = llama.Model(llama.ModelArgs.from_dict(config))
    nn.quantize(network, 32, 8, mode="mxfp8")
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantized_activations_that_cannot_be_are_refused(folder, request):
    code, out = generate(folder, "-qa")
    assert code == 2
    assert "activations are quantized as weights are, and these are: affine" in out
    assert "or leave --quantize-activations out" in out
    whole = json.dumps({**CONFIG, "quantization": None})
    (folder / "config.json").write_text(whole)
    with pytest.raises(UnsupportedError, match="these are: none"):
        tq.load(str(folder), model_config={"quantize_activations": True})
    if mx.default_device().type == mx.DeviceType.cpu:
        code, out = generate(request.getfixturevalue("in_mxfp8"), "-qa")
        assert (code, "no quantized activations on the CPU" in out) == (2, True)


def test_activations_are_quantized_where_they_can_be(in_mxfp8, monkeypatch):
    gpu = types.SimpleNamespace(type=mx.DeviceType.gpu)
    monkeypatch.setattr(loading.mx, "default_device", lambda: gpu)
    for choice, layer in ((True, nn.QQLinear), (False, nn.QuantizedLinear)):
        options = {"quantize_activations": choice}
        network, _ = tq.load(str(in_mxfp8), model_config=options)
        assert type(network.layers[0].self_attn.q_proj) is layer


#: A draft model or the model, changes of its folder, and what is said.
FOLDERS = {
    "fields": ("draft-", {"config.json": {"model_type": "llama"}}, "no hidden_size, "),
    "groups": ("", {"config.json": {**CONFIG, "hidden_size": 1}}, "groups of weights"),
    "ids": ("", {"tokenizer.json": tiny_folder.tokenizer(first=10_000)}, "for 0..31"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_server_looks_at_models_as_other_commands_do(run_cli, folder, case):
    """MLX ends the process on the second, and reads what is not its own on the last."""
    option, changed, says = FOLDERS[case]
    for name, content in changed.items():
        (folder / name).write_text(json.dumps(content))
    models = ["--model", str(MODEL), f"--{option}model", str(folder)]
    code, _, err = run_cli("server", *models, "--port", "0")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line

"""A tiny quantized llama on disk with a tokenizer of a few words, for commands."""

import importlib
import json

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

WORDS = ("<end>", "<pad>", "hello", "there", "world", "A", "B", "a", "b", "I", "say")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "quantization": {"group_size": 32, "bits": 4},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}say {% endif %}"
)


def tokenizer(words=WORDS, first=0):
    """Contents of a ``tokenizer.json`` that gives words the ids from ``first`` on."""
    vocabulary = {word: first + i for i, word in enumerate(words)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[1]},
    }


def write(folder, kind="llama", **contents):
    """The folder, with other contents where they are named: JSON, text or bytes."""
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {**CONFIG, "model_type": kind}
    model = module.Model(module.ModelArgs.from_dict(config))
    nn.quantize(model, group_size=32, bits=4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    files = {
        "config": config,
        "model.safetensors.index": {
            "weight_map": dict.fromkeys(weights, "model.safetensors")
        },
        "tokenizer": tokenizer(),
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<end>",
            "pad_token": "<pad>",
        },
        **contents,
    }
    for name, content in files.items():
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        (folder / f"{name}.json").write_bytes(content)
    return folder

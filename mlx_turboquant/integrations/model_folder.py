"""What a model's folder must be before MLX is given it: its config and its sizes.

`read_config` looks at config.json, `checked_model` at weights against the layers they
are for, `check_vocabulary` at the tokenizer against the embedding. MLX ends the process
on some sizes that do not fit one another, instead of an error.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as host

from ..errors import UnsupportedModelError, shown
from ..regular import check_regular

_REMEDY = (
    "give a folder with config.json and safetensors, or a hub id such as "
    "'mlx-community/Llama-3.2-3B-Instruct-4bit'"
)
#: Whole numbers from 1 on, or left out, in the configs of all models that have them.
_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "n_embd", "n_layer", "n_head"),
)
#: Of them, and of other models, how many layers there are: each is a module of Python,
#: so that a model of a million is being built for hours.
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("num_transformer_layers", "num_nextn_predict_layers", "depth"),
)
_MOST_LAYERS = 4096
#: Likewise, but 0 says that there is none.
_COUNTS_OR_NONE = ("head_dim", "max_position_embeddings", "sliding_window")
#: Numbers above 0.
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")
#: An axis of MLX is shorter.
_MOST = 2**31 - 1
_GROUP_SIZES = (16, 32, 64, 128)
#: How Python says that a config, or a part of it, leaves fields of its class out.
_MISSING = re.compile(
    r"(\w*(?:Args|Config))\.__init__\(\) missing \d+ required [\w-]+ arguments?: (.+)"
)


def cannot_load(model: str, reason: str) -> UnsupportedModelError:
    """The error for a model that cannot be loaded."""
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    if is_path and not Path(model).exists():
        reason = "there is no such folder"  # and it is no name of the hub's either
    return UnsupportedModelError(
        f"cannot load model {shown(model)} ({reason})", _REMEDY
    )


def checked_name(model: Any) -> str:
    """What a model is called, a folder or a hub id, as text.

    Raises:
        UnsupportedModelError: if it is neither: nothing, or the model itself.
    """
    if not isinstance(model, str | Path):
        raise UnsupportedModelError(
            f"the model's name is of type {type(model).__name__}, no text", _REMEDY
        )
    if not str(model):
        raise cannot_load("", "its name is empty")
    return str(model)


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, KeyError):
        return f"no {error}"
    if missing := _MISSING.search(str(error)):
        names = ", ".join(re.findall(r"'(\w+)'", missing[2]))
        return f"config.json has no {names}, which {missing[1]} needs"
    lines = str(error).strip().splitlines()
    return (
        " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__
    )


def check_files(folder: Path, model: str) -> None:
    """Make sure that reading a folder's files ends.

    Raises:
        UnsupportedModelError: if there is a pipe, a socket or a device among them.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            check_regular(path)
        except OSError as error:
            raise cannot_load(model, f"{path.name}: {error.strerror}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``, with numbers where numbers belong.

    Raises:
        UnsupportedModelError: if it is missing, no JSON object, or has a value that no
            model could be built of; or as `check_files`.
    """
    name = str(folder)
    check_files(folder, name)
    config = _read_object(folder / "config.json", name)
    if not isinstance(config.get("model_type"), str):
        raise cannot_load(name, "config.json has no model_type that is a text")
    if (folder / "generation_config.json").is_file():
        _read_object(folder / "generation_config.json", name)
    text = config.get("text_config")
    if text is not None and not isinstance(text, Mapping):
        raise cannot_load(name, f"text_config {text!r} is no object")
    for part in (config, text or {}):
        _check_values(part, name)
    for part in (config, *config.values()):
        if isinstance(part, Mapping):
            _check_layers(part, name)
    return config


def _read_object(path: Path, model: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise cannot_load(model, f"{path.name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise cannot_load(model, f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise cannot_load(model, f"{path.name} is a {type(value).__name__}, no object")
    return value


def _check_values(config: Mapping[str, Any], model: str) -> None:
    for names, least in ((_COUNTS, 1), (_COUNTS_OR_NONE, 0)):
        for name in names:
            value: Any = config.get(name)
            is_count = type(value) is int and least <= value <= _MOST
            # Some types have a number for each layer.
            if value is not None and not is_count and not isinstance(value, list):
                raise cannot_load(
                    model, f"{name} {value!r} is no whole number in {least}..{_MOST}"
                )
            if value == []:
                raise cannot_load(model, f"{name} is an empty list")
    for name in _POSITIVE:
        value = config.get(name)
        is_number = type(value) in (int, float) and 0 < value < float("inf")
        if value is not None and not is_number and not isinstance(value, list):
            raise cannot_load(model, f"{name} {value!r} is no number above 0")
    quantization = config.get("quantization")
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise cannot_load(model, f"quantization {quantization!r} is no object")
    for part in (quantization, *quantization.values()):
        if isinstance(part, Mapping):
            _check_quantization(part, model)


def _check_layers(config: Mapping[str, Any], model: str) -> None:
    for name in _LAYERS:
        value = config.get(name)
        if isinstance(value, int | float) and value > _MOST_LAYERS:
            raise cannot_load(model, f"{name} {value} is over {_MOST_LAYERS} layers")


def _check_quantization(values: Mapping[str, Any], model: str) -> None:
    size, bits = values.get("group_size", 64), values.get("bits", 4)
    if type(size) is not int or size not in _GROUP_SIZES:
        raise cannot_load(model, f"group_size {size!r} is none of {_GROUP_SIZES}")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise cannot_load(model, f"quantization bits {bits!r} are outside 2..8")


def classes_of(config: dict[str, Any]) -> tuple[type[nn.Module], Any]:
    """mlx-lm's classes of a model and of its config.

    Raises:
        ValueError: if it has none; also where it would end the process, as for a type
            whose own package is not installed.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            found: tuple[type[nn.Module], Any] = host._get_classes(config)
        except SystemExit as error:
            reason = said.getvalue().strip() or f"it ends with {error.code}"
            raise ValueError(reason) from error
    return found


def checked_model(
    config: dict[str, Any],
) -> tuple[Callable[[Any], nn.Module], Any]:
    """`classes_of`, for models that look at weights given to them."""
    model_class, args_class = classes_of(config)

    def build(args: Any) -> nn.Module:
        model = model_class(args)
        sanitize = getattr(model, "sanitize", None)

        def checked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            del model.sanitize  # the instance's; the class's stays
            weights = weights if sanitize is None else sanitize(weights)
            _check_groups(model, weights)
            return weights

        model.sanitize = checked
        return model

    return build, args_class


def _check_groups(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Groups of quantized weights must divide the layers' elements, or MLX crashes."""
    for path, module in model.named_modules():
        scales = weights.get(f"{path}.scales")
        if scales is None or not hasattr(module, "to_quantized") or not scales.ndim:
            continue
        elements, groups = module.weight.shape[-1], scales.shape[-1]
        if not groups or elements % groups:
            raise ValueError(
                f"{path}: {groups} groups of weights are not for {elements} elements"
            )


def embedding_rows(network: nn.Module) -> int | None:
    """How many token ids a model has an embedding for; None if it does not say.

    A token beyond them is read from memory that is not the model's.
    """
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    rows = [m.weight.shape[0] for m in network.modules() if isinstance(m, kinds)]
    args = getattr(network, "args", None) or getattr(network, "config", None)
    for holder in (args, getattr(args, "text_config", None)):
        said: Any = (
            holder.get("vocab_size")
            if isinstance(holder, dict)
            else getattr(holder, "vocab_size", None)
        )
        if said in rows or (isinstance(said, int) and not rows):
            return int(said)
    return max(rows, default=None)


def check_vocabulary(network: nn.Module, tokenizer: Any, model: str) -> None:
    """Make sure that the tokenizer is of this model.

    Tokens that were added to it may lie beyond the embedding, as padding does in some
    models; a text that has one is refused when it is read (`check_tokens`).

    Raises:
        UnsupportedModelError: if other tokens of it have no embedding.
    """
    rows = embedding_rows(network)
    if rows is None:
        return
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    ids = [i for i in tokenizer.get_vocab().values() if i >= rows and i not in added]
    if ids:
        raise cannot_load(
            model,
            f"its tokenizer has ids up to {max(ids)}, its embedding is for "
            f"0..{rows - 1}: they are not of one model",
        )


def check_tokens(network: nn.Module, tokens: list[int], source: str) -> None:
    """Make sure that a model has an embedding for every token.

    Args:
        network: The model.
        tokens: Of a text.
        source: What has them, for the error.

    Raises:
        UnsupportedModelError: if it has none for one.
    """
    rows = embedding_rows(network)
    beyond = [t for t in tokens if t < 0 or (rows is not None and t >= rows)]
    if beyond:
        raise UnsupportedModelError(
            f"{source} has token {beyond[0]}, the model's are 0..{(rows or 1) - 1}",
            "use the tokenizer that belongs to the model",
        )

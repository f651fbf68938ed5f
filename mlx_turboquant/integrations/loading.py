"""Loading a model and its tokenizer for the machine at hand.

The loading itself is mlx-lm's; the dtype on a CPU and the words for a failure are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as host

from ..errors import TurboQuantError, UnsupportedError, UnsupportedModelError
from ..regular import check_regular
from . import model_folder


def load(
    model: str,
    *,
    adapter_path: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    revision: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, ...]:
    """Load ``(model, tokenizer)`` from a folder or a hub id, as ``mlx_lm.load`` does.

    On MLX's CPU device the weights become float32: products of fp16, bf16 and
    quantized matrices run 10-50 times slower there.

    Args:
        model: A folder or a hub id.
        adapter_path: A folder of trained adapters.
        tokenizer_config: Options of the tokenizer.
        model_config: Values that win over those of ``config.json``.
        revision: Of a hub id.
        lazy: Leave weights on disk until they are used.
        return_config: Return the config as well, as the third.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UnsupportedModelError: if there is no such model, mlx-lm cannot load it, its
            tokenizer is another model's, or the adapters are.
        UnsupportedError: if activations cannot be quantized here.
    """
    model = model_folder.checked_name(model)
    try:
        folder = host._download(model, revision=revision)
        config = {**model_folder.read_config(folder), **(model_config or {})}
        if config.get("quantize_activations", False):
            _check_activations(config)
        network, config = host.load_model(
            folder,
            lazy,
            model_config=model_config,
            get_model_classes=model_folder.checked_model,
            trust_remote_code=trust_remote_code,
        )
        if adapter_path is not None:
            network = _with_adapters(network, adapter_path)
        tokenizer = host.load_tokenizer(
            folder, tokenizer_config, eos_token_ids=config.get("eos_token_id")
        )
        tokenizer.encode("a")  # some are built and fail at the first text
        model_folder.check_vocabulary(network, tokenizer, model)
    except TurboQuantError:
        raise
    except Exception as error:  # whatever is made of a stranger's files
        reason = model_folder.first_line(error)
        raise model_folder.cannot_load(model, reason) from error
    cast_for_device(network)
    return (network, tokenizer, config) if return_config else (network, tokenizer)


def is_cast_for_device() -> bool:
    """Whether models become float32 when they are loaded."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def _check_activations(config: Mapping[str, Any]) -> None:
    """Make sure that MLX can quantize activations of such a model on this device."""
    for name in ("quantization", "quantization_config"):
        if isinstance(values := config.get(name), Mapping):
            mode = values.get("mode") or values.get("quant_method") or "affine"
            break
    else:
        mode = "none"
    if mode in ("affine", "none"):
        raise UnsupportedError(
            f"activations are quantized as weights are, and these are: {mode}",
            "choose a model in nvfp4 or mxfp8, or leave --quantize-activations out",
        )
    if mx.default_device().type == mx.DeviceType.cpu:
        raise UnsupportedError(
            "MLX multiplies no quantized activations on the CPU",
            "use a GPU, or leave --quantize-activations out",
        )


def check_adapters(adapter_path: str) -> None:
    """Make sure that there is a folder of adapters that can be read.

    Raises:
        UnsupportedModelError: if there is not.
    """
    folder = Path(adapter_path)
    try:
        for name in ("adapter_config.json", "adapters.safetensors"):
            check_regular(folder / name)
            with (folder / name).open("rb"):
                pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _cannot_adapt(adapter_path, f"{name}: {reason}") from error


def _with_adapters(network: nn.Module, adapter_path: str) -> nn.Module:
    check_adapters(adapter_path)
    try:
        network = host.load_adapters(network, adapter_path)
    except Exception as error:  # whatever is made of a stranger's files
        reason = model_folder.first_line(error)
        raise _cannot_adapt(adapter_path, reason) from error
    network.eval()
    return network


def _cannot_adapt(adapter_path: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot load adapters {adapter_path!r} ({reason})",
        "give a folder with adapter_config.json and adapters.safetensors that were "
        "trained for this model, or leave --adapter-path out",
    )


def cast_for_device(network: nn.Module) -> None:
    """On MLX's CPU device, make the weights float32."""
    if is_cast_for_device():
        host.dequantize_model(network)
        network.set_dtype(mx.float32)


def context_length(network: nn.Module) -> int | None:
    """Longest text the model was made for, in tokens; None if it does not say."""
    args = getattr(network, "args", None) or getattr(network, "config", None)
    text = getattr(args, "text_config", None)
    for holder in (args, text):
        limit = (
            holder.get("max_position_embeddings")
            if isinstance(holder, dict)
            else getattr(holder, "max_position_embeddings", None)
        )
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def check_context(
    network: nn.Module,
    tokens: int,
    subject: str = "the prompt has",
    remedy: str = "shorten the prompt or choose a model with a longer context",
) -> None:
    """Make sure that ``tokens`` are no more than the model was made for.

    Args:
        network: The model.
        tokens: How many the whole text has.
        subject: What has so many, for the error.
        remedy: What to do about it, for the error.

    Raises:
        UnsupportedError: if they are more.
    """
    limit = context_length(network)
    if limit is not None and tokens > limit:
        raise UnsupportedError(
            f"{subject} {tokens} tokens, the model's context is {limit}", remedy
        )

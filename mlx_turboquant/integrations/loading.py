"""Loading a model and its tokenizer for the machine at hand.

The loading itself is mlx-lm's; the dtype on a CPU and the words for a failure are ours.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx_lm import load as host_load
from mlx_lm.utils import dequantize_model

from ..errors import UnsupportedError, UnsupportedModelError


def load(model: str, **options: Any) -> tuple[nn.Module, Any]:
    """Load ``(model, tokenizer)`` from a folder or a hub id.

    On MLX's CPU device the weights become float32: products of fp16, bf16 and
    quantized matrices run 10-50 times slower there.

    Args:
        model: A folder or a hub id.
        options: Passed on to ``mlx_lm.load``.

    Raises:
        UnsupportedModelError: if there is no such model or mlx-lm cannot load it.
    """
    try:
        network, tokenizer = host_load(model, **options)[:2]
    except (OSError, ValueError, RuntimeError, HFValidationError, HfHubHTTPError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UnsupportedModelError(
            f"cannot load model {model!r} ({first})",
            "give a folder with config.json and safetensors, or a hub id such as "
            "'mlx-community/Llama-3.2-3B-Instruct-4bit'",
        ) from e
    cast_for_device(network)
    return network, tokenizer


def cast_for_device(network: nn.Module) -> None:
    """On MLX's CPU device, make the weights float32."""
    if mx.default_device().type == mx.DeviceType.cpu:
        dequantize_model(network)
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
        if limit:
            return int(limit)
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

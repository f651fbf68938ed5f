"""A model's `Footprint` from its config alone: of weights, only their sizes are read.

Owns building a model without weights, asking its stock caches for their shapes after
a few tokens that nothing evaluates, and estimating what its parameters take.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
)
from mlx_lm.utils import _get_classes as classes_of
from mlx_lm.utils import load_config

from ..errors import UnsupportedModelError
from ..memory import Footprint, Layer
from .factory import leaves, slots_or_none, stock_caches
from .loading import context_length

_INDEX = "model.safetensors.index.json"
_UNIT = 2  # bytes of an unquantized weight
#: What configs call the number of experts a token is sent to.
_CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k"),
)


def footprint(model: str) -> Footprint:
    """Shapes and sizes of a model that is not loaded.

    Args:
        model: A folder or a hub id; of the latter, ``config.json`` and the weights'
            index are downloaded.

    Raises:
        UnsupportedModelError: if there is no such config, or mlx-lm has no such model.
    """
    try:
        folder = Path(model) if Path(model).is_dir() else _fetched(model)
        config = load_config(folder)
        model_class, args_class = classes_of(config)
        network = model_class(args_class.from_dict(config))
    except (OSError, ValueError, KeyError, HFValidationError, HfHubHTTPError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"cannot read the config of model {model!r} ({first})",
            "give a folder with config.json, or a hub id such as "
            "'mlx-community/Llama-3.2-3B-Instruct-4bit'",
        ) from error
    weights, active = _weights(network, config)
    stored = _stored(folder)
    if stored:
        weights, active = stored, round(active * stored / weights)
    return of_network(network, weights, active)


def of_network(
    network: nn.Module, weights: int | None = None, active: int | None = None
) -> Footprint:
    """Shapes and sizes of a loaded model, or of one without weights.

    Args:
        network: Any model of mlx-lm's.
        weights: Bytes of its weights, where its parameters would mislead.
        active: Bytes of those that one token reads.
    """
    if weights is None or active is None:
        weights, active = _weights(network, {})
    caches = stock_caches(network)
    network(mx.array([[0, 1]]), cache=caches)  # for its shapes; nothing evaluates it
    layers, fixed = [], 0
    for cache, slot in zip(leaves(caches), slots_or_none(network), strict=True):
        keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
        if keys is None or values is None:
            fixed += int(getattr(cache, "nbytes", 0))
            continue
        window = getattr(cache, "max_size", getattr(cache, "chunk_size", None))
        packs = slot is not None and not slot.stock
        dims = (keys.shape[1], keys.shape[3], values.shape[3])
        layers.append(Layer(*dims, window=window, packed=packs))
    return Footprint(tuple(layers), weights, active, fixed, context_length(network))


def _fetched(model: str) -> Path:
    config = hf_hub_download(model, "config.json")
    with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(model, _INDEX)
    return Path(config).parent


def _stored(folder: Path) -> int:
    """Bytes of the weights on disk, or as their index says; 0 if unknown."""
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if files or not (folder / _INDEX).exists():
        return files
    index = json.loads((folder / _INDEX).read_text())
    return int(index.get("metadata", {}).get("total_size", 0))


def _weights(network: nn.Module, config: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all weights, and of those that one token reads."""
    quantization = config.get("quantization") or {}
    bits = 8.0 * _UNIT
    if "bits" in quantization:  # and a scale and a bias, 16 bits each, for every group
        bits = quantization["bits"] + 32 / quantization.get("group_size", 64)
    text = {**config, **(config.get("text_config") or {})}
    chosen = next((text[name] for name in _CHOSEN if text.get(name)), None)
    untied = any("lm_head" in name for name, _ in network.named_modules())
    whole, active = 0.0, 0.0
    for _, module in network.named_modules():
        own = {k: v for k, v in module.items() if isinstance(v, mx.array)}
        size = 0.0
        for name, array in own.items():
            if "scales" in own:
                size += array.nbytes  # quantized already
            elif name == "weight" and hasattr(module, "to_quantized"):
                size += array.size * bits / 8
            else:
                size += array.size * _UNIT
        whole += size
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and untied:
            continue  # one row of it
        experts = getattr(module, "num_experts", None)
        if chosen and experts and own and next(iter(own.values())).ndim == 3:
            size *= min(1.0, chosen / experts)
        active += size
    return round(whole), round(active)

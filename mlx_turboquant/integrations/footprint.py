"""A model's `Footprint` from its config alone: of weights, only their sizes are read.

The model is built without weights; the shapes of its caches come from the same dry run
(`probe`) that decides what they can store.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from mlx_lm.utils import load_config

from ..entries import CacheEntry
from ..errors import TurboQuantError, UnsupportedModelError
from ..memory import CHUNK, IN_FLIGHT, Footprint
from . import probe
from .loading import context_length, is_cast_for_device
from .model_folder import cannot_load, checked_name, classes_of, first_line, read_config
from .stock import stock_caches

_INDEX = "model.safetensors.index.json"
_FP16_BYTES = 2
#: What configs call the number of experts that a token is sent to.
_EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    *("moe_topk", "moe_top_k", "moe_k"),
)


def footprint(model: str, dtype: mx.Dtype | None = None) -> Footprint:
    """Shapes and sizes of a model that is not loaded.

    Args:
        model: A folder or a hub id; of the latter, ``config.json`` and the weights'
            index are downloaded.
        dtype: Of keys and values before they are compressed; None for what `load` would
            have here: float32 on MLX's CPU device, else what the weights are.

    Raises:
        UnsupportedModelError: if there is no such config, or mlx-lm has no such model.
    """
    model = checked_name(model)
    try:
        folder = folder_of(model)
        read_config(folder)
        config = load_config(folder)
        model_class, args_class = classes_of(config)
        network = model_class(args_class.from_dict(config))
        network.set_dtype(dtype or _dtype_of(folder, config))
    except TurboQuantError:
        raise
    except Exception as error:  # whatever is made of a stranger's config
        raise cannot_load(model, first_line(error)) from error
    weights, active = _weight_bytes(network, config)
    on_disk = _bytes_on_disk(folder)
    if on_disk:
        weights, active = on_disk, round(active * on_disk / weights)
    return of_network(network, weights, active)


def of_network(
    network: nn.Module,
    weights: int | None = None,
    active: int | None = None,
    entries: Sequence[CacheEntry] | None = None,
) -> Footprint:
    """Shapes and sizes of a loaded model, or of one without weights.

    Args:
        network: Any model of mlx-lm's.
        weights: Bytes of all weights, where the parameters in memory would mislead.
        active: Bytes of the weights that one token reads; given with ``weights``.
        entries: Records of its cache entries, where there are some already.
    """
    if weights is None or active is None:
        weights, active = _weight_bytes(network, {})
    if entries is None:
        stock = stock_caches(network)
        try:
            entries = probe.entries_of(network, stock)
        except UnsupportedModelError as error:  # it may still run on mlx-lm's caches
            entries = probe.uncompressed_entries(network, stock, error.reason)
    return Footprint(
        layers=tuple(entry for entry in entries if entry.shape is not None),
        weights=weights,
        active=active,
        fixed=sum(entry.state_bytes for entry in entries),
        context=context_length(network),
        activations=_activation_bytes(network),
    )


def _activation_bytes(network: nn.Module) -> int:
    """Of a chunk in two layers: what their linear layers put out, and as much again.

    The latter is what is made of it element by element.
    """
    widths: dict[str, int] = {}
    for name, module in network.named_modules():
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        weight = getattr(module, "weight", None)
        if numbers and hasattr(module, "to_quantized") and weight is not None:
            layer = ".".join(parts[: numbers[0] + 1])
            width = weight.shape[-2] if weight.ndim > 1 else 0
            widths[layer] = widths.get(layer, 0) + width
    return IN_FLIGHT * 2 * CHUNK * _FP16_BYTES * max(widths.values(), default=0)


def folder_of(model: str) -> Path:
    """Where a model's config is; that of a hub id, and its index, are downloaded.

    Raises:
        OSError, HFValidationError, HfHubHTTPError: if there is none.
    """
    if Path(model).is_dir():
        return Path(model)
    config = hf_hub_download(model, "config.json")
    with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(model, _INDEX)
    return Path(config).parent


def _dtype_of(folder: Path, config: dict[str, Any]) -> mx.Dtype:
    """What a loaded model computes in on this machine's device."""
    if is_cast_for_device():
        return mx.float32
    sizes: dict[mx.Dtype, int] = {}
    for file in folder.glob("*.safetensors"):
        arrays: Any = mx.load(str(file))  # of which no data is read
        for array in arrays.values():
            if mx.issubdtype(array.dtype, mx.floating):
                sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    if sizes:
        return max(sizes, key=lambda dtype: sizes[dtype])
    text = {**config, **(config.get("text_config") or {})}
    named = getattr(mx, str(text.get("dtype") or text.get("torch_dtype")), None)
    return named if isinstance(named, mx.Dtype) else mx.bfloat16


def _bytes_on_disk(folder: Path) -> int:
    """Bytes of the weights on disk, or as their index says; 0 if unknown."""
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if files or not (folder / _INDEX).exists():
        return files
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return int(index["metadata"]["total_size"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


def _weight_bytes(network: nn.Module, config: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all weights, and of those that one token reads."""
    quantization = config.get("quantization") or {}
    bits = 8.0 * _FP16_BYTES
    if "bits" in quantization:  # and a scale and a bias, 16 bits each, for every group
        bits = quantization["bits"] + 32 / quantization.get("group_size", 64)
    text = {**config, **(config.get("text_config") or {})}
    per_token = next((text[n] for n in _EXPERTS_PER_TOKEN if text.get(n)), None)
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
                size += array.size * _FP16_BYTES
        whole += size
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and untied:
            continue  # one row of it
        experts = getattr(module, "num_experts", None)
        # Experts are stacked: their weights have an axis more than others.
        if per_token and experts and own and next(iter(own.values())).ndim == 3:
            size *= min(1.0, per_token / experts)
        active += size
    return round(whole), round(active)

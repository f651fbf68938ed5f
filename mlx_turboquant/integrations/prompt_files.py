"""Prompt-cache files: mlx-lm's format, whole or absent, and checked.

What a layer's state holds is its cache's own (``cache/state.py``).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host_cache
from mlx.utils import tree_flatten

from ..atomic import replacing
from ..entries import PromptCache
from ..errors import FormatError, UnsupportedError, UnsupportedModelError
from ..explanation import explain
from . import hook
from .stock import stock_caches

#: Where the checksum stands among the file's metadata.
_CHECKSUM = "mlx_turboquant_checksum"


def save_prompt_cache(
    path: str | Path, cache: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """Save a prompt cache in mlx-lm's file format, all of it or nothing.

    Args:
        path: A ``.safetensors`` file; an older one stays intact until the end.
        cache: Any prompt cache of mlx-lm or of ours.
        metadata: Text to keep beside it, as in mlx-lm.

    Raises:
        UnsupportedError: if the file would not hold all that a prompt left behind.
    """
    if isinstance(cache, PromptCache) and cache.unsaved:
        raise UnsupportedError(
            f"this prompt cache cannot be saved: {cache.unsaved}",
            "keep it in memory, beside its model",
        )
    checked = {**(metadata or {}), _CHECKSUM: _checksum(cache)}
    with replacing(_with_suffix(path)) as file:
        host_cache.save_prompt_cache(str(file), cache, checked)


def load_prompt_cache(
    path: str | Path, model: nn.Module | None = None, return_metadata: bool = False
) -> Any:
    """Load a prompt cache that `save_prompt_cache` or mlx-lm wrote.

    Args:
        path: The file.
        model: The model that will read it; hooks its attention. Without it, call
            `apply` or `make_prompt_cache` on the model before generating.
        return_metadata: Also return the metadata, as in mlx-lm.

    Raises:
        FormatError: if the file is missing, unreadable, foreign, damaged or newer.
        UnsupportedModelError: if the model has another number of caches.
    """
    hook.register()
    path = path if Path(path).is_file() else _with_suffix(path)
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
        cache, metadata = host_cache.load_prompt_cache(str(path), return_metadata=True)
        checksum = metadata.pop(_CHECKSUM, None)  # mlx-lm's own files have none
        is_damaged = checksum is not None and checksum != _checksum(cache)
    except FormatError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"cannot read a prompt cache from {path} ({first}); "
            "make it again with tq.save_prompt_cache"
        ) from error
    if is_damaged:
        raise FormatError(
            f"{path} is damaged: its checksum is not that of what it holds; "
            "make it again with tq.save_prompt_cache"
        )
    if model is not None:
        check_cache(model, cache, str(path))
    cache = PromptCache(cache, entries=())
    return (cache, metadata) if return_metadata else cache


def check_cache(model: nn.Module, cache: list[Any], name: str) -> None:
    """Make sure ``model`` can read ``cache``, and hook it if that is needed.

    Raises:
        UnsupportedModelError: if the model has another number of caches.
    """
    count = len(stock_caches(model))
    if count != len(cache):
        raise UnsupportedModelError(
            f"{name} holds {len(cache)} layer caches, the model has {count}",
            "use the model that made it",
        )
    if explain(cache).packed_layers:
        hook.install(model)


def _with_suffix(path: str | Path) -> Path:
    """With the suffix that MLX knows the format by."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    return path.with_name(f"{path.name}.safetensors")


def _checksum(cache: list[Any]) -> str:
    """BLAKE2b of every layer's class and state, arrays with names and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for layer in cache:
        digest.update(type(layer).__name__.encode())
        leaves: list[tuple[str, Any]] = tree_flatten(layer.state)  # type: ignore[assignment]
        for name, leaf in sorted(leaves, key=lambda leaf: leaf[0]):
            digest.update(name.encode())
            if isinstance(leaf, mx.array):
                digest.update(f"{leaf.dtype}{leaf.shape}".encode())
                flat = mx.contiguous(leaf).reshape(-1)
                digest.update(memoryview(flat.view(mx.uint8)))  # type: ignore[arg-type]
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()

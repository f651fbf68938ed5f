"""Prompt-cache files: mlx-lm's format, whole or absent, and checked.

What a layer's state holds is its cache's own (``cache/state.py``), what a file says of
itself `prompt_headers`'s, and whether it is a model's `prompt_fit`'s.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache as host_cache
from mlx.utils import tree_flatten

from ..atomic import replacing
from ..entries import PromptCache
from ..errors import (
    FormatError,
    SpecError,
    TurboQuantError,
    UnsupportedError,
)
from ..regular import check_regular
from . import hook, prompt_fit, prompt_headers
from .model_folder import first_line

#: Where the checksum stands among the file's metadata.
_CHECKSUM = "mlx_turboquant_checksum"
#: What else is there that is ours and not the user's.
_OURS = (_CHECKSUM, prompt_fit.SAMPLE)


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
        SpecError: if there can be no such file, or `load_prompt_cache` would refuse it.
    """
    if not isinstance(cache, Sequence) or not cache:
        raise SpecError(
            f"{'an empty' if isinstance(cache, Sequence) else 'a'} "
            f"{type(cache).__name__} is no prompt cache; give what "
            "tq.make_prompt_cache or mlx-lm's make_prompt_cache returned"
        )
    if isinstance(cache, PromptCache) and cache.unsaved:
        raise UnsupportedError(
            f"this prompt cache cannot be saved: {cache.unsaved}",
            "keep it in memory, beside its model",
        )
    file = checked_target(path)
    names = [type(layer).__name__ for layer in cache]
    checked = {
        **(metadata or {}),
        _CHECKSUM: _checksum(names, [layer.state for layer in cache]),
        prompt_fit.SAMPLE: prompt_fit.sample(cache),
    }
    try:
        with replacing(file) as beside:
            host_cache.save_prompt_cache(str(beside), hook.labelled(cache), checked)
            prompt_headers.check_container(beside)
    except (OSError, RuntimeError) as error:
        raise _cannot_write(path, error) from error
    except ValueError as error:  # metadata of no texts, or of too many
        raise _cannot_write(path, error, "keep less beside it, and texts alone") from (
            error
        )


def checked_target(path: str | Path) -> Path:
    """The file that `save_prompt_cache` writes for ``path``.

    Raises:
        SpecError: if there can be no such file; whether it can be written is not known
            before it is.
    """
    try:
        file = _with_suffix(path)
        # A file beside it, with the suffix, is not what a folder's name asks for.
        _check_kinds(Path(path), file)
        if not file.parent.is_dir():
            raise FileNotFoundError(2, f"there is no folder {file.parent}", str(file))
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    return file


def load_prompt_cache(
    path: str | Path, model: nn.Module | None = None, return_metadata: bool = False
) -> Any:
    """Load a prompt cache that `save_prompt_cache` or mlx-lm wrote.

    Args:
        path: The file.
        model: The model that will read it; hooks its attention. Without it, call
            `check_cache` before generating.
        return_metadata: Also return the metadata, as in mlx-lm.

    Raises:
        FormatError: if the file is missing, unreadable, foreign, damaged or newer.
        UnsupportedModelError: if it is another model's.
    """
    hook.register()
    try:
        file = _existing(path)
        contents = prompt_headers.read(file)
        metadata = dict(contents.metadata)
        checksum, sample = (metadata.pop(name, None) for name in _OURS)
        names = [hook.class_name(label) for label in contents.classes]
        is_ours = checksum is not None  # mlx-lm's own files have none
        if is_ours and checksum != _checksum(names, contents.states):
            raise FormatError(
                "it is damaged: its checksum is not that of what it holds"
            )
        cache = [
            hook.cache_class(name).from_state(state)
            for name, state in zip(names, contents.states, strict=True)
        ]
        if is_ours or sample is not None:
            prompt_fit.check_sample(cache, sample)
    except Exception as error:  # whatever a stranger's file makes of it
        other = _another(error) or "make it again with tq.save_prompt_cache"
        raise FormatError(
            f"cannot read a prompt cache from {path} ({_reason(error)}); {other}"
        ) from error
    if model is not None:
        prompt_fit.check(model, cache, str(path))
    cache = PromptCache(cache, entries=())
    return (cache, metadata) if return_metadata else cache


def check_cache(model: nn.Module, cache: Sequence[Any], name: str) -> None:
    """Make sure ``model`` can read ``cache``, and hook its attention.

    Args:
        model: The model.
        cache: What `load_prompt_cache` returned.
        name: Of the file, for the error.

    Raises:
        UnsupportedModelError: if it is another model's.
        FormatError: if its layers are not of one text.
    """
    prompt_fit.check(model, cache, name)


def _existing(path: str | Path) -> Path:
    """The file that is there, with the suffix or without it."""
    named = [Path(path), _with_suffix(path)]
    for file in named:
        if file.is_file():
            return file
        # A file beside a folder is not what the folder's name asks for.
        _check_kinds(file)
    raise FileNotFoundError(2, "there is no such file", str(path))


def _check_kinds(*paths: Path) -> None:
    """Make sure that each is of a file, or of nothing.

    Raises:
        OSError: if one is not.
    """
    for path in paths:
        check_regular(path)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))


def _with_suffix(path: str | Path) -> Path:
    """With the suffix that MLX knows the format by."""
    named = Path(path)
    if named.name in ("", "..") or "\0" in named.name:
        raise ValueError("it names no file")
    if named.suffix == ".safetensors":
        return named
    return named.with_name(f"{named.name}.safetensors")


def _cannot_write(
    path: str | Path, error: Exception, other: str = "name another file"
) -> SpecError:
    other = _another(error) or other
    return SpecError(
        f"cannot write a prompt cache to {path} ({_reason(error)}); {other}"
    )


def _another(error: Exception) -> str | None:
    """What to do about a path of something that is no file; None if it is a file's."""
    if isinstance(error, IsADirectoryError):
        return "name a file in it"
    is_odd = isinstance(error, OSError) and error.errno == errno.EINVAL
    return "name another file" if is_odd else None


def _reason(error: Exception) -> str:
    if isinstance(error, TurboQuantError):
        return str(error)
    return str(getattr(error, "strerror", None) or first_line(error))


def _checksum(names: Sequence[str], states: Sequence[Any]) -> str:
    """BLAKE2b of every layer's class and state, arrays with names and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, state in zip(names, states, strict=True):
        digest.update(name.encode())
        leaves: list[tuple[str, Any]] = tree_flatten(state)  # type: ignore[assignment]
        for place, leaf in sorted(leaves, key=lambda leaf: leaf[0]):
            digest.update(place.encode())
            if isinstance(leaf, mx.array):
                digest.update(f"{leaf.dtype}{leaf.shape}".encode())
                flat = mx.contiguous(leaf).reshape(-1)
                digest.update(memoryview(flat.view(mx.uint8)))  # type: ignore[arg-type]
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()

"""What a prompt-cache file says of itself: read, and checked, before MLX reads it.

The container is safetensors, the names in it are those of mlx-lm's
``save_prompt_cache``: arrays ``LAYER.PLACE``, texts ``0.NAME`` (metadata), ``1.LAYER``
(class) and ``2.N.0``, ``2.N.1`` (which arrays are numbers, texts or nothing). What the
arrays of a layer mean is its cache's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import FormatError

#: Bytes of a header at most: a chat's tokens are in it, several MB for a million.
_MOST_HEADER = 64 << 20
_MOST_ARRAYS = 100_000
_MOST_LAYERS = 10_000
#: Characters of a text that is stored as an array: a layer's header has some 200.
_MOST_TEXT = 4096
#: Parts of an array's name: lists of caches hold caches.
_MOST_DEPTH = 8
_MOST_AXIS = 2**31 - 1
_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class Contents:
    """A prompt-cache file.

    Attributes:
        metadata: The texts that were saved beside it.
        classes: Each layer's class, as the file names it.
        states: Each layer's state: a tree of arrays, numbers, texts and None.
    """

    metadata: dict[str, str]
    classes: list[str]
    states: list[Any]


def read(path: Path) -> Contents:
    """Read a file; arrays are read when they are used.

    Raises:
        FormatError: without the path, if it is no prompt cache.
        OSError: if it cannot be read.
        RuntimeError: by MLX, likewise.
    """
    check_container(path)
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    arrays, texts = loaded
    metadata, classes, kinds = _texts(texts)
    trees: list[dict[str, Any]] = [{} for _ in classes]
    for name, array in arrays.items():
        first, *parts = name.split(".")
        if not _is_index(first) or int(first) >= len(classes):
            raise FormatError(f"array {name!r} is of none of {len(classes)} layers")
        if len(parts) > _MOST_DEPTH:
            raise FormatError(f"array {name!r} has too many parts")
        leaf = _value(name, array, kinds.pop(name, None))
        _put(trees[int(first)], parts, leaf, name)
    if kinds:
        raise FormatError(f"it has no array {next(iter(kinds))!r}")
    return Contents(metadata, classes, [_tree(tree) for tree in trees])


def check_container(path: Path) -> None:
    """The container's own header, before MLX believes it; and behind what was written.

    Raises:
        FormatError: without the path, if it is none, or larger than is read.
        OSError: if the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FormatError("it is no safetensors file, or was cut off")
        if length > _MOST_HEADER:
            raise FormatError(f"its header has {length} bytes, over {_MOST_HEADER}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict) or len(header) > _MOST_ARRAYS:
        raise FormatError(f"its header is no object of up to {_MOST_ARRAYS} arrays")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(
        isinstance(text, str) for text in texts.values()
    ):
        raise FormatError("its metadata is not all texts")
    for name, entry in header.items():
        if not _is_array(entry, size - 8 - length):
            raise FormatError(f"array {name!r} does not fit the file")


def _is_array(entry: Any, data: int) -> bool:
    if not isinstance(entry, dict) or entry.get("dtype") not in _SIZES:
        return False
    shape: Any = entry.get("shape")
    place: Any = entry.get("data_offsets")
    if not (_are_counts(shape, _MOST_AXIS) and _are_counts(place, data)):
        return False
    size: int = math.prod(shape) * _SIZES[entry["dtype"]]
    return len(place) == 2 and place[1] - place[0] == size


def _are_counts(values: Any, most: int) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= most for value in values
    )


def _texts(
    texts: dict[str, str],
) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Metadata, classes by layer, and kinds by the name of an array."""
    metadata, classes, places = {}, {}, {}
    for name, text in texts.items():
        group, _, rest = name.partition(".")
        if group == "0":
            metadata[rest] = text
        elif group == "1" and _is_index(rest):
            classes[int(rest)] = text
        elif group == "2":
            places[rest] = text
        else:
            raise FormatError(f"it has a text {name!r}, which no prompt cache has")
    if not classes or len(classes) > _MOST_LAYERS:
        raise FormatError(f"it has {len(classes)} layers, not 1..{_MOST_LAYERS}")
    if set(classes) != set(range(len(classes))):
        raise FormatError("its layers are not numbered from 0 on")
    places.pop("0", None)  # mlx-lm's list begins with an empty text
    kinds = {}
    for number in range(1, len(places) // 2 + 1):
        array, kind = places.pop(f"{number}.0", None), places.pop(f"{number}.1", None)
        if array is None or kind is None:
            break
        kinds[array] = kind
    if places:
        raise FormatError(f"it has a text '2.{next(iter(places))}' without another")
    return metadata, [classes[layer] for layer in range(len(classes))], kinds


def _value(name: str, array: mx.array, kind: str | None) -> Any:
    """An array, or what mlx-lm has put into one."""
    if kind is None:
        return array
    is_whole = mx.issubdtype(array.dtype, mx.integer)
    if kind == "none" and array.size == 0:
        return None
    if kind == "scalar" and array.size == 1:
        return array.item()
    if kind == "string" and is_whole and array.ndim == 1 and array.size <= _MOST_TEXT:
        codes: Any = array.tolist()
        if all(0 <= code < 0x110000 for code in codes):
            return "".join(map(chr, codes))
    raise FormatError(f"array {name!r} {array.dtype} {array.shape} is no {kind}")


def _put(tree: dict[str, Any], parts: list[str], leaf: Any, name: str) -> None:
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise FormatError(f"array {name!r} is in another array")
    last = parts[-1] if parts else ""
    if last in tree:
        raise FormatError(f"array {name!r} is there twice")
    tree[last] = leaf


def _tree(tree: Any) -> Any:
    """Lists in the place of dicts whose keys count from 0 on."""
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {""}:
        return tree[""]
    branches = {name: _tree(branch) for name, branch in tree.items()}
    if not any(map(_is_index, branches)):
        return branches
    if set(branches) != set(_numbers(len(branches))):
        raise FormatError("its lists are not numbered from 0 on")
    return [branches[number] for number in _numbers(len(branches))]


def _numbers(count: int) -> Iterable[str]:
    return map(str, range(count))


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9

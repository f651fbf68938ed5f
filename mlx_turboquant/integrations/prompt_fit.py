"""Whether caches out of a file are this model's, and all of one text.

Checked before any is used: a layer's kind and shapes against the model's dry run
(`probe`), lengths against one another, codes against a sample of what they decoded to,
and all of it by a step of the model that nothing evaluates.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import TurboQuantCache
from ..entries import CacheEntry, PromptCache
from ..errors import FormatError, UnsupportedModelError
from ..segments import CompressedTokens
from ..tiles import in_vectors
from ..tokens import TILE, TokenArrays
from . import hook, probe, vision
from .model_folder import first_line
from .stock import labelled_leaves, stock_caches

#: Where a file has what some codes decode to, among its metadata.
SAMPLE = "mlx_turboquant_sample"
_SAMPLED = 8
#: Of a vector's norm an element; what machines differ by is a thousandth of it.
_TOLERANCE = 1e-3
#: Classes that may stand where a model's own cache would, by that one's class.
_IN_PLACE_OF = {
    "KVCache": (
        *("KVCache", "QuantizedKVCache", "RotatingKVCache"),
        *("TurboQuantCache", "RotatingTurboQuantCache", "ScoredTurboQuantCache"),
    ),
    "RotatingKVCache": ("RotatingKVCache", "RotatingTurboQuantCache"),
}


def check(model: nn.Module, caches: Sequence[Any], name: str) -> None:
    """Make sure that ``model`` can go on from ``caches``; hooks its attention.

    Args:
        model: The model.
        caches: Its layers' caches, out of a file.
        name: Of the file, for the error.

    Raises:
        UnsupportedModelError: if they are another model's.
        FormatError: if they are not of one text.
    """
    stock = stock_caches(model)
    if len(stock) != len(caches):
        raise UnsupportedModelError(
            f"{name} holds {len(caches)} layer caches, the model has {len(stock)}",
            "use the model that made it",
        )
    try:
        entries = probe.entries_of(model, stock)
    except UnsupportedModelError as error:  # it may still run on mlx-lm's caches
        entries = probe.uncompressed_entries(model, stock, error.reason)
    leaves = list(labelled_leaves(caches))
    if [label for label, _ in leaves] != [entry.label for entry in entries]:
        raise _of_another(name, f"lists of caches {[label for label, _ in leaves]}")
    for (label, leaf), entry in zip(leaves, entries, strict=True):
        _check_kind(f"{name}, layer {label}", leaf, entry)
    batch = _check_lengths(name, [leaf for _, leaf in leaves], entries)
    hook.install(model)
    _try_a_step(model, caches, name, batch)


def _check_kind(where: str, leaf: Any, entry: CacheEntry) -> None:
    kind = type(leaf).__name__
    if kind not in _IN_PLACE_OF.get(entry.kind, (entry.kind,)):
        raise _of_another(where, f"a {kind} where the model has a {entry.kind}")
    if isinstance(leaf, TurboQuantCache):
        if not entry.is_compressed:
            raise _of_another(where, f"codes, where {entry.reason}")
        if leaf.returns_arrays != (entry.decision == "returns_arrays"):
            raise _of_another(where, "codes that are decoded elsewhere")
    window = getattr(leaf, "max_size", None)
    if window is not None and entry.kind == "RotatingKVCache":
        there = window, leaf.keep
        if there != (entry.sliding_window, entry.keep):
            raise _of_another(where, f"a window of {window} tokens, {leaf.keep} kept")
    shape = _shape(leaf)
    if shape is not None and entry.shape is not None and shape[1:] != entry.shape:
        raise _of_another(
            where,
            f"(heads, key, value) of {shape[1:]}, where the model has {entry.shape}",
        )


def _shape(leaf: Any) -> tuple[int, int, int, int] | None:
    """(Rows, KV heads, elements of a key, of a value); None if it does not say.

    Raises:
        FormatError: if keys and values are none.
    """
    if isinstance(leaf, TurboQuantCache):
        if leaf.empty():
            return None
        sides = [side.shape for side in leaf.compressed()]
        return sides[0][0], sides[0][1], sides[0][3], sides[1][3]
    keys: Any = getattr(leaf, "keys", None)
    values: Any = getattr(leaf, "values", None)
    if not isinstance(keys, mx.array) and not isinstance(values, mx.array):
        return None
    for array in (keys, values):
        if not (
            isinstance(array, mx.array)
            and array.ndim == 4
            and mx.issubdtype(array.dtype, mx.floating)
            and array.shape[:3] == keys.shape[:3]
            and mx.all(mx.isfinite(array)).item()
        ):
            raise FormatError(
                "a layer's keys and values are not as many finite vectors"
            )
    return keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3]


def _check_lengths(
    name: str, leaves: Sequence[Any], entries: Sequence[CacheEntry]
) -> int:
    """That all layers have seen one text of one batch; returns its rows."""
    shapes = [_shape(leaf) for leaf in leaves]
    rows = {shape[0] for shape in shapes if shape is not None}
    if len(rows) > 1:
        raise FormatError(f"{name} is of batches of {sorted(rows)} rows; make it again")
    lengths = {}
    for leaf, entry, shape in zip(leaves, entries, shapes, strict=True):
        seen = getattr(leaf, "offset", None)
        if seen is None:
            continue
        stored = getattr(getattr(leaf, "keys", None), "shape", (0, 0, seen))[2]
        whole = type(leaf).__name__ == "KVCache"
        place = getattr(leaf, "_idx", 0)  # that a window writes to next
        if (
            type(seen) is not int
            or type(place) is not int
            or seen < 0
            or not 0 <= place <= stored
            or (whole and seen > stored)
        ):
            raise FormatError(f"{name} has a layer of {seen!r} tokens; make it again")
        if seen or (shape is not None or entry.shape is not None):
            lengths[seen] = entry.label
    if len(lengths) > 1:
        raise FormatError(
            f"{name} has layers of {sorted(lengths)} tokens, which are not of one "
            "text; make it again"
        )
    return next(iter(rows), 1)


def _try_a_step(model: nn.Module, caches: Sequence[Any], name: str, batch: int) -> None:
    """One token more, which nothing evaluates: shapes that do not fit fail."""
    try:
        with vision.kept_positions(model):
            trial = copy.deepcopy(PromptCache(caches, ()))
            vision.call(model, mx.zeros((batch, 1), mx.int32), trial)
    except Exception as error:  # whatever a model's code makes of them
        raise _of_another(name, f"what the model fails on ({first_line(error)})") from (
            error
        )


def _of_another(where: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} holds {what}", "use the model that made it, or make it again"
    )


# Codes whose header says another seed or codec have the same shapes.


def sample(caches: Sequence[Any]) -> str:
    """What some of the codes decode to, as JSON, for `check_sample`."""
    decoded = [
        [[round(value, 4) for value in values[:_SAMPLED]] for values in sides]
        for sides in _decoded(caches)
    ]
    return json.dumps(decoded)


def check_sample(caches: Sequence[Any], text: str | None) -> None:
    """Make sure that codes still decode to what they did when they were saved.

    Args:
        caches: Of a file.
        text: What `sample` said; None if the file does not say.

    Raises:
        FormatError: without the file's name, if they do not, or there are some and no
            sample of them.
    """
    if text is None:
        if next(_decoded(caches), None) is not None:
            raise FormatError("it has codes, and no sample of what they decode to")
        return
    try:
        wanted = json.loads(text)
        pairs = list(zip(_decoded(caches), wanted, strict=True))
        for sides, wanted_sides in pairs:
            for got, want in zip(sides, wanted_sides, strict=True):
                limit = 1e-4 + _TOLERANCE * math.hypot(*got)
                some = zip(got[:_SAMPLED], want, strict=True)
                if not all(abs(a - b) <= limit for a, b in some):
                    raise ValueError("it decodes to something else")
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            f"its codes are not what was saved: {error}; its header was changed"
        ) from error


def _decoded(caches: Sequence[Any]) -> Iterator[list[list[float]]]:
    """The last vector of keys and of values that is codes, of each layer with any."""
    for _, leaf in labelled_leaves(caches):
        if isinstance(leaf, TurboQuantCache) and leaf.packed_length:
            yield [_last_vector(side) for side in leaf.compressed()]


def _last_vector(side: CompressedTokens) -> list[float]:
    packed = side.packed
    assert packed is not None, "there are codes"
    head = slice(0, 1)
    rows = {name: packed.view(name, head)[:1, :, -1:] for name in packed.arrays}
    count = 1 if packed.layout is None else TILE
    codes = in_vectors(TokenArrays(rows, count, layout=packed.layout))
    decoded = side.quantizer.decode(codes, head, first=packed.length - count)
    values: list[float] = decoded[0, 0, -1].tolist()  # type: ignore[assignment]
    return values

"""The saved form of a cache: a header line and named arrays (``docs/format.md``).

Owns the format version and the header; what arrays must be is `state_checks`'s. Reading
and writing of the file itself is mlx-lm's (see ``integrations``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..codecs.registry import RESEARCH
from ..errors import FormatError
from ..packed_codes import PackedCodes
from ..quantizer import Sides
from ..spec import CacheSpec
from ..version import __version__
from .state_checks import check

#: Raised by any change to bit layout, levels, signs or array names.
FORMAT_VERSION = 6
_MAGIC = "mlx_turboquant"
#: Numbers that only some kinds of caches have: windows, and those that score pages.
_KINDS = ("max_size", "scored")
_GROUPS = ("sink", "packed", "recent", "means", "gains", "queries")
Groups = dict[str, dict[str, mx.array]]
State = dict[str, Any]
Numbers = dict[str, int]


def join_sides(packed: Sides[PackedCodes]) -> dict[str, mx.array]:
    """The used tokens of both sides' arrays under ``keys_NAME`` and ``values_NAME``."""
    return {
        f"{side}_{name}": array
        for side, codes in packed.items()
        for name, array in codes.views().items()
    }


def split_sides(arrays: Mapping[str, mx.array]) -> Sides[dict[str, mx.array]]:
    """The inverse of `join_sides`."""
    sides: Sides[dict[str, mx.array]] = Sides({}, {})
    for name, array in arrays.items():
        side, _, rest = name.partition("_")
        (sides.keys if side == "keys" else sides.values)[rest] = array
    return sides


def to_state(
    spec: CacheSpec, groups: Mapping[str, Mapping[str, mx.array]], numbers: Numbers
) -> State:
    """The tree of arrays and text that mlx-lm evaluates and saves.

    Args:
        spec: Of the cache.
        groups: Its arrays.
        numbers: Whole numbers that are no part of the spec, by name.
    """
    words = [_MAGIC, _version_of(spec.full), spec.full]
    words += [f"{name}={number}" for name, number in numbers.items()]
    state: dict[str, Any] = {"header": " ".join(words)}
    for group, arrays in groups.items():
        for name, array in arrays.items():
            state[f"{group}:{name}"] = array
    return state


def from_state(
    state: Mapping[str, Any], of_kind: Sequence[str] = ()
) -> tuple[CacheSpec, Groups, Numbers]:
    """The inverse of `to_state`.

    Args:
        state: What it made.
        of_kind: Those of `_KINDS` that must be in it; the others must not.

    Raises:
        FormatError: saying what is foreign, damaged or newer.
    """
    header = state.get("header") if isinstance(state, Mapping) else None
    words = header.split() if isinstance(header, str) else []
    if len(words) < 3 or words[0] != _MAGIC:
        raise FormatError(
            "this is not a mlx_turboquant prompt cache (no header); "
            "make it again with tq.save_prompt_cache"
        )
    version = _version_of(words[2])
    if words[1] != version:
        raise FormatError(
            f"cache format {words[1]} is not {version}, the one this version "
            "reads; update mlx-tq or make the cache again"
        )
    try:
        spec = CacheSpec.parse(words[2])
        pairs = [word.partition("=") for word in words[3:]]
        numbers = {name: int(number) for name, _, number in pairs}
        for name in ("returns_arrays", "tiles"):
            if name not in numbers:
                raise ValueError(f"it does not say {name}=")
        if len(numbers) != len(pairs):
            raise ValueError(f"{header!r} says something twice")
        if {name for name in _KINDS if name in numbers} != set(of_kind):
            raise ValueError(f"it is of another kind of cache: {header!r}")
    except ValueError as error:  # as is SpecError
        raise FormatError(f"the cache's header is damaged: {error}") from error
    groups: Groups = {group: {} for group in _GROUPS}
    for key, array in state.items():
        group, _, name = key.partition(":")
        if key == "header":
            continue
        if group not in groups or not isinstance(array, mx.array):
            raise FormatError(
                f"the cache's state has {key!r}, which no version writes; the file is "
                "damaged, make the cache again"
            )
        groups[group][name] = array
    check(spec, groups, numbers)
    return spec, groups, numbers


def _version_of(spec: str) -> str:
    """The format's version; with a research codec, that of the package too.

    What those store may change with any version.
    """
    return (
        f"{FORMAT_VERSION}+{__version__}" if RESEARCH in spec else f"{FORMAT_VERSION}"
    )

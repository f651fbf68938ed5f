"""The saved form of a cache: a header line and named arrays (``docs/format.md``).

Owns the format version and the checks on foreign state. Reading and writing of the
file itself is mlx-lm's (see ``integrations``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..codecs import codec_for
from ..codecs.base import Codec, Side
from ..codecs.registry import RESEARCH
from ..errors import FormatError
from ..page_table import PackedCodes
from ..quantizer import Sides
from ..spec import CacheSpec, CodecSpec
from ..tiles import tile_layout
from ..version import __version__

#: Raised by any change to bit layout, levels, signs or array names.
FORMAT_VERSION = 6
_MAGIC = "mlx_turboquant"
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


def from_state(state: Mapping[str, Any]) -> tuple[CacheSpec, Groups, Numbers]:
    """The inverse of `to_state`.

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
        if numbers["tiles"] not in (0, 1):
            raise ValueError(f"tiles={numbers['tiles']} is neither 0 nor 1")
    except ValueError as error:  # as is SpecError
        raise FormatError(f"the cache's header is damaged: {error}") from error
    groups: Groups = {group: {} for group in _GROUPS}
    for key, array in state.items():
        group, _, name = key.partition(":")
        if group in groups:
            groups[group][name] = array
    _check(spec, groups, bool(numbers["tiles"]))
    return spec, groups, numbers


def _version_of(spec: str) -> str:
    """The format's version; with a research codec, that of the package too.

    What those store may change with any version.
    """
    return (
        f"{FORMAT_VERSION}+{__version__}" if RESEARCH in spec else f"{FORMAT_VERSION}"
    )


def _check(spec: CacheSpec, groups: Groups, in_tiles: bool) -> None:
    recent = groups["recent"]
    if not recent and not groups["packed"]:
        return
    packed = set(groups["packed"])
    whole = set(recent) == {"keys", "values"} and set(groups["sink"]) <= set(recent)
    sides: tuple[tuple[Side, CodecSpec], ...]
    sides = (("keys", spec.keys), ("values", spec.values))
    for side, codec in sides:
        held = recent.get(side, groups["sink"].get(side))
        made = None if held is None else codec_for(codec, held.shape[3], side)
        wanted = {f"{side}_{name}" for name in made.arrays} if made else set()
        whole = whole and (not packed or wanted <= packed)
        if whole and packed and made:
            whole = _has_widths(made, side, groups["packed"], in_tiles)
    lengths = {array.shape[2] for array in groups["packed"].values()}
    if not whole or len(lengths) > 1:
        raise FormatError(
            "the cache's arrays do not fit its header; the file is damaged, "
            "make the cache again"
        )


def _has_widths(
    codec: Codec, side: Side, packed: Mapping[str, mx.array], in_tiles: bool
) -> bool:
    """Whether words lie in the order they are said to: kernels go by their widths."""
    if codec.kernel_format is None:
        return not in_tiles
    layout = tile_layout(codec, side)
    words, scales = (packed[f"{side}_{name}"].shape[3] for name in ("words", "scales"))
    if in_tiles:
        return (words, scales) == (layout.tile_words, layout.tile_scales)
    return words == layout.vector_words

"""The text form of a spec, such as ``"k4v3,codec=trellis,window=64"``: read and write.

It begins with the bits, options follow in any order:

    bits      3 | 3.5 | 3.25 | k4v3 | k16v3 | auto
    options   codec=NAME or NAME/NAME, sink=, window=, page=, center=page|off,
              equalize=on|off, seed=, evict=sliding|score; with auto: budget=, quality=

What values are allowed is `spec`'s to check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .codecs.registry import IDENTITY, codec_info
from .errors import SpecError

DEFAULT_CODEC = "turboquant"
ADVICE = "use 1..8, a mean such as 3.25, sides such as 'k4v3' or 'k16v3', or 'auto'"
#: Tokens that eviction by score keeps or drops together, unless ``page=`` says others:
#: with more, a small limit holds too few pages to choose from (dev/LOG.md).
SCORED_PAGE = 32
_SIDES = re.compile(r"k(\d{1,9}(?:\.\d{1,9})?)v(\d{1,9}(?:\.\d{1,9})?)")
_WHOLE_NUMBERS = ("sink", "window", "page", "seed")
#: Bits of sides that are still to be chosen: any that adaptive codecs have.
_UNCHOSEN = (3.0, 3.0)
_CHOSEN_LATER = {"budget", "quality"}
_BALANCED = {"quality": "balanced"}

Names = tuple[str, str]
Bits = tuple[float, float]


def read_spec(
    text: str, overrides: Mapping[str, Any]
) -> tuple[Names, Bits, dict[str, Any]]:
    """Codec names and bits of (keys, values), and the other fields that are said.

    Args:
        text: The spec.
        overrides: Options that win over the text's.

    Raises:
        SpecError: naming the part that cannot be read.
    """
    head, *parts = text.strip().lower().split(",")
    options = dict(map(_read_option, parts)) | dict(overrides)
    if options.get("evict") == "score":
        options.setdefault("page", SCORED_PAGE)
    names = side_names(options.pop("codec", DEFAULT_CODEC))
    chosen_later = _CHOSEN_LATER & options.keys()
    if head == "auto":
        return names, _UNCHOSEN, options if chosen_later else options | _BALANCED
    bits, budget = _read_bits(head, names)
    if budget is not None:
        return names, bits, options | {"budget": budget}
    if chosen_later:
        (said, *_) = sorted(chosen_later)
        raise SpecError(
            f"{said}= is for bits that are chosen, and {head} says them; "
            "write 'auto' in its place"
        )
    return names, bits, options


def write_spec(names: Names, bits: Bits, options: Mapping[str, Any], full: bool) -> str:
    """The inverse of `read_spec`.

    Args:
        names: Codec names of (keys, values).
        bits: Bits of (keys, values).
        options: Other fields to write; those that are None are left out.
        full: Whether to write the default codec too.
    """
    said = {name: value for name, value in options.items() if value is not None}
    parts = [f"k{bits[0]:g}v{bits[1]:g}"]
    if _CHOSEN_LATER & said.keys():
        parts = ["auto"]
    codec = _codec_text(*names)
    if full or codec != DEFAULT_CODEC:
        parts.append(f"codec={codec}")
    for name, value in said.items():
        shown = ("off", "on")[value] if isinstance(value, bool) else value
        parts.append(f"{name}={shown}")
    return ",".join(parts)


def side_names(codec: str) -> Names:
    """Codec names of keys and values in ``NAME`` or ``NAME/NAME``.

    One name serves both sides, unless it can only do keys.
    """
    keys, _, values = codec.partition("/")
    if not values:
        values = DEFAULT_CODEC if codec_info(keys).keys_only else keys
    return keys, values


def _codec_text(keys: str, values: str) -> str:
    """The inverse of `side_names`."""
    names = {keys, values} - {IDENTITY}  # which is written as 16 bits
    if len(names) == 1:
        return names.pop()
    return keys if side_names(keys) == (keys, values) else f"{keys}/{values}"


def _read_bits(head: str, names: Names) -> tuple[Bits, float | None]:
    """Bits of keys and values, and the mean to meet if they are to be chosen."""
    if match := _SIDES.fullmatch(head):
        return (float(match[1]), float(match[2])), None
    try:
        bits = float(head)
    except ValueError:
        raise SpecError(f"cannot read bits from {head!r}; {ADVICE}") from None
    if bits != bits or abs(bits) > 32:
        raise SpecError(f"{head} bits per element is not possible; {ADVICE}")
    if all(bits in codec_info(name).widths for name in names):
        return (bits, bits), None
    twice = 2 * bits
    if twice != int(twice):
        return _UNCHOSEN, bits
    return ((int(twice) + 1) // 2, int(twice) // 2), None


def _read_option(option: str) -> tuple[str, Any]:
    """One ``name=value`` of a spec's text."""
    name, sep, value = option.strip().partition("=")
    if name in ("codec", "center", "evict", "quality") and sep:
        return name, value
    if name == "equalize" and value in ("on", "off"):
        return name, value == "on"
    if name == "budget":
        try:
            return name, float(value)
        except ValueError:
            raise SpecError(f"budget={value!r} is not a number") from None
    if name in _WHOLE_NUMBERS:
        try:
            return name, int(value)
        except ValueError:
            raise SpecError(f"{name}={value!r} is not a whole number") from None
    raise SpecError(
        f"option {option!r} is unknown; use codec=, sink=, window=, page=, "
        "center=page|off, equalize=on|off, seed=, evict=sliding|score, or with auto "
        "budget=, quality="
    )

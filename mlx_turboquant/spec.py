"""Options, parsed once: `CodecSpec` for one side, `CacheSpec` for a whole cache.

Owns the text form (``"k4v3,window=64"``) and the limits of every option. Owns no
arrays: inside the package a spec is already right and is never checked again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import SpecError

_WHOLE: tuple[float, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
#: Codec names accepted by ``codec=``, besides the ``k16``/``v16`` shorthand, and the
#: code bits each can have (what they count: ``docs/codecs.md``).
WIDTHS: dict[str, tuple[float, ...]] = {
    "turboquant": _WHOLE,
    "turboquant-plain": _WHOLE,
    "turboquant-eden": _WHOLE,
    "turboquant-drive": _WHOLE,
    "turboquant-prod": _WHOLE[1:],
    "turboquant-outlier": tuple(b / 4 for b in range(4, 29) if b % 4),
    "trellis": (1, 1.5, 2, 2.5, 3, 3.5, 4),
    "turboangle": tuple(b / 2 for b in range(2, 9)),
    "turboangle-fixed": (2.5, 3, 3.5, 4),
    "polarquant": (3.875,),
    "rotated-int4": (4,),
    "hqmq": (2, 2.5, 3, 3.5, 4),
    "residual": _WHOLE[1:],
    "affine": (2, 3, 4, 5, 6, 8),
    "qjl": _WHOLE,
    "jl": _WHOLE,
}
CODEC_NAMES = tuple(WIDTHS)
#: Codecs that only estimate inner products; values then take `_USUAL`.
KEYS_ONLY = ("qjl", "jl")
#: Codecs whose bits can be chosen by layer.
ADAPTIVE = ("turboquant", "trellis")
_USUAL = "turboquant"
_SIDES = re.compile(r"k(\d+(?:\.\d+)?)v(\d+(?:\.\d+)?)")
_LIMITS = {"sink": (0, 1024), "window": (0, 65536), "page": (16, 1024)}
_ADVICE = "use 1..8, a mean such as 3.25, sides such as 'k4v3' or 'k16v3', or 'auto'"
CENTERS = ("page", "first", "off")
QUALITIES = ("lossless", "balanced", "small")
#: Mean code bits that `cache.bit_allocation` can meet: its widths go from 2 to 8.
_BUDGETS = (2, 8)


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """One side (keys or values) of a cache.

    Args:
        name: One of `CODEC_NAMES`, or ``"identity"`` for vectors kept as they are.
        bits: Code bits per element, scales not counted: one of the codec's `WIDTHS`,
            or 16 for identity. Whole numbers are ints.

    Raises:
        SpecError: for an unknown name or a width outside the set.
    """

    name: str
    bits: float

    def __post_init__(self) -> None:
        if self.name == "identity":
            if self.bits != 16:
                raise SpecError(f"identity codec has 16 bits, not {self.bits}")
            return
        known = WIDTHS.get(self.name)
        if known is None:
            names = ", ".join(CODEC_NAMES)
            raise SpecError(f"codec {self.name!r} is unknown; choose from: {names}")
        if self.bits not in known:
            if known == _WHOLE:
                raise SpecError(
                    f"{self.bits:g} bits per element is outside 1..8; {_ADVICE}"
                )
            widths = ", ".join(f"{width:g}" for width in known)
            raise SpecError(
                f"{self.name} has no {self.bits:g} bits per element; use {widths}"
            )

    @classmethod
    def of(cls, name: str, bits: float) -> CodecSpec:
        """The codec for ``bits``, where 16 means "keep this side as it is"."""
        bits = int(bits) if bits == int(bits) else bits
        return cls("identity", 16) if bits == 16 else cls(name, bits)

    def __str__(self) -> str:
        return f"{self.name}:{self.bits:g}"


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Everything that decides what a compressed cache stores.

    Args:
        keys: Codec of the keys.
        values: Codec of the values.
        sink: First tokens kept in the model's dtype.
        window: Most recent tokens kept in the model's dtype. Between ``window``
            and ``window + page`` recent tokens are held at any time.
        page: Tokens encoded together; the first page also sets the basis.
        center: Key mean subtracted before quantizing: one per ``"page"``, the
            ``"first"`` page's for all, or ``"off"``.
        equalize: Divide channels by gains measured on the first page.
        seed: Seed of the rotation signs (see ``docs/format.md``).
        budget: Choose each layer's bits from the text's first page, so that they are
            this many on average, code bits per element. Until then ``keys`` and
            ``values`` only name the codec.
        quality: Likewise, with as few bits as ``"lossless"``, ``"balanced"`` or
            ``"small"`` allows.

    Raises:
        SpecError: for a value outside its limits.

    >>> str(CacheSpec.parse("3.5"))
    'k4v3'
    >>> CacheSpec.parse("k4v3,window=64").window
    64
    """

    keys: CodecSpec
    values: CodecSpec
    sink: int = 4
    window: int = 32
    page: int = 128
    center: str = "page"
    equalize: bool = True
    seed: int = 0
    budget: float | None = None
    quality: str | None = None

    def __post_init__(self) -> None:
        self._check_choice()
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise SpecError(
                    f"{name} {value} is outside {low}..{high}; "
                    f"leave it out for {_default(name)}"
                )
        if self.center not in CENTERS:
            raise SpecError(
                f"center={self.center} is unknown; use one of {', '.join(CENTERS)}"
            )
        if not 0 <= self.seed < 2**32:
            raise SpecError(f"seed {self.seed} is outside 0..2**32-1; leave it out")
        if self.keys.name == self.values.name == "identity":
            raise SpecError("k16v16 compresses nothing; lower one side, as in 'k16v4'")

    def _check_choice(self) -> None:
        low, high = _BUDGETS
        if self.budget is not None and not low <= self.budget <= high:
            raise SpecError(
                f"{self.budget:g} bits on average are outside {low}..{high}; {_ADVICE}"
            )
        if self.quality not in (None, *QUALITIES):
            raise SpecError(
                f"quality={self.quality} is unknown; use one of {', '.join(QUALITIES)}"
            )
        if self.budget is not None and self.quality is not None:
            raise SpecError(
                f"quality={self.quality} and {self.budget:g} bits on average both say "
                "how many bits to use; leave one out"
            )
        if self.adaptive:
            _check_adaptive((self.keys.name, self.values.name))
        if self.values.name in KEYS_ONLY:
            raise SpecError(
                f"{self.values.name} only estimates inner products, which values are "
                f"not read by; write codec={self.values.name}/{_USUAL}"
            )

    @property
    def adaptive(self) -> bool:
        """Whether bits are still to be chosen, from the text."""
        return self.budget is not None or self.quality is not None

    @classmethod
    def parse(cls, text: str | float | CacheSpec, **overrides: Any) -> CacheSpec:
        """Read ``3``, ``"3.5"``, ``"k4v3"`` or ``"k4v3,window=64,center=off"``.

        A half step is the mean of the two sides: 3.5 is ``k4v3``, because error
        in the keys costs more than error in the values; a codec that has 3.5 bits of
        its own, such as ``trellis``, takes them on both. Any other mean, such as
        3.25, is met on average over the layers, whose bits are then chosen from the
        text; ``"auto,budget=3"`` says so of a whole number, ``"auto"`` alone aims at
        a ``quality`` (``"balanced"`` unless given).

        Args:
            text: The spec. A ready `CacheSpec` passes through.
            overrides: Fields that win over the text; ``None`` leaves one alone.
                ``codec=NAME`` picks the codec of both sides, ``codec=NAME/NAME`` of
                keys and values.

        Raises:
            SpecError: naming the part that cannot be read.
        """
        given = {k: v for k, v in overrides.items() if v is not None}
        if isinstance(text, CacheSpec):
            spec, codec = text, given.pop("codec", None)
            if codec is not None:
                names = _sides_of(codec)
                keys = CodecSpec.of(names[0], spec.keys.bits)
                values = CodecSpec.of(names[1], spec.values.bits)
                spec = replace(spec, keys=keys, values=values)
            return replace(spec, **given)
        head, *options = str(text).strip().lower().split(",")
        for option in options:
            name, value = _read_option(option)
            given.setdefault(name, value)
        names = _sides_of(given.pop("codec", _USUAL))
        k_bits, v_bits, budget = _read_bits(head, names)
        if budget is not None or head == "auto":
            _check_adaptive(names)  # before a width is asked of them that they have not
        if budget is not None:
            given["budget"] = budget
        elif head == "auto" and not {"budget", "quality"} & given.keys():
            given["quality"] = "balanced"
        elif head != "auto" and {"budget", "quality"} & given.keys():
            raise SpecError(
                f"budget= and quality= choose the bits, and {head} says them; "
                "write 'auto' in its place"
            )
        keys, values = CodecSpec.of(names[0], k_bits), CodecSpec.of(names[1], v_bits)
        return cls(keys, values, **given)

    def __str__(self) -> str:
        return self._text(full=False)

    @property
    def full(self) -> str:
        """The text with every field spelled out, as written into files."""
        return self._text(full=True)

    @property
    def _codec(self) -> str:
        names = [self.keys.name, self.values.name]
        if "identity" in names:  # written as 16 bits
            names.remove("identity")
        if names[0] in KEYS_ONLY and names[-1] == _USUAL:
            return names[0]
        return names[0] if names[0] == names[-1] else "/".join(names)

    def _text(self, full: bool) -> str:
        parts = [f"k{self.keys.bits:g}v{self.values.bits:g}"]
        if self.adaptive:
            parts = ["auto"]
        codec = self._codec
        if full or codec != _USUAL:
            parts.append(f"codec={codec}")
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value is None:
                continue
            if full or value != field.default:
                shown = ("off", "on")[value] if isinstance(value, bool) else value
                parts.append(f"{field.name}={shown}")
        return ",".join(parts)


def _default(name: str) -> Any:
    return next(f.default for f in fields(CacheSpec) if f.name == name)


def _check_adaptive(names: tuple[str, str]) -> None:
    for name in names:
        if name not in ADAPTIVE:
            raise SpecError(
                f"bits of codec {name} cannot be chosen from the text; say "
                f"them, as in 3, or use codec={' or codec='.join(ADAPTIVE)}"
            )


def _sides_of(codec: str) -> tuple[str, str]:
    """Codec names of keys and values."""
    keys, _, values = codec.partition("/")
    return keys, values or (_USUAL if keys in KEYS_ONLY else keys)


def _read_bits(head: str, names: tuple[str, str]) -> tuple[float, float, float | None]:
    """Bits of keys and values, and the mean to meet if they are to be chosen."""
    if head == "auto":
        return 3, 3, None
    if match := _SIDES.fullmatch(head):
        return float(match[1]), float(match[2]), None
    try:
        bits = float(head)
    except ValueError:
        raise SpecError(f"cannot read bits from {head!r}; {_ADVICE}") from None
    if bits != bits or abs(bits) > 32:
        raise SpecError(f"{head} bits per element is not possible; {_ADVICE}")
    if all(bits in WIDTHS.get(name, ()) for name in names):
        return bits, bits, None
    twice = 2 * bits
    if twice != int(twice):
        return 3, 3, bits
    return (int(twice) + 1) // 2, int(twice) // 2, None


def _read_option(option: str) -> tuple[str, Any]:
    """One ``name=value`` of a spec's text."""
    name, sep, value = option.strip().partition("=")
    if name == "codec" and sep:
        return name, value
    if name in ("center", "quality") and sep:
        return name, value
    if name == "budget":
        try:
            return name, float(value)
        except ValueError:
            raise SpecError(f"budget={value!r} is not a number") from None
    if name == "equalize" and value in ("on", "off"):
        return name, value == "on"
    if name in (*_LIMITS, "seed"):
        try:
            return name, int(value)
        except ValueError:
            raise SpecError(f"{name}={value!r} is not a whole number") from None
    raise SpecError(
        f"option {option!r} is unknown; use codec=, sink=, window=, page=, "
        "center=page|first|off, equalize=on|off, seed=, or with auto budget=, quality="
    )

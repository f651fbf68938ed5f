"""Options, parsed once: `CodecSpec` for one side, `CacheSpec` for a whole cache.

Owns the text form (``"k4v3,window=64"``) and the limits of every option. Owns no
arrays: inside the package a spec is already right and is never checked again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from .errors import SpecError

#: Codec names accepted by ``codec=``, besides the ``k16``/``v16`` shorthand.
CODEC_NAMES = ("turboquant",)
MAX_BITS = 8
_SIDES = re.compile(r"k(\d+)v(\d+)")
_LIMITS = {"sink": (0, 1024), "window": (0, 65536), "page": (16, 1024)}
_ADVICE = "use 1..8, a mean such as 3.25, sides such as 'k4v3' or 'k16v3', or 'auto'"
CENTERS = ("page", "first", "off")
QUALITIES = ("lossless", "balanced", "small")
#: Mean code bits that `cache.allocation` can meet: its widths go from 2 to 8.
_BUDGETS = (2, 8)


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """One side (keys or values) of a cache.

    Args:
        name: ``"turboquant"``, or ``"identity"`` for vectors kept as they are.
        bits: Code bits per element, scales not counted: 1..8, or 16 for identity.

    Raises:
        SpecError: for an unknown name or a width outside the set.
    """

    name: str
    bits: int

    def __post_init__(self) -> None:
        if self.name == "identity":
            if self.bits != 16:
                raise SpecError(f"identity codec has 16 bits, not {self.bits}")
        elif self.name not in CODEC_NAMES:
            known = ", ".join(CODEC_NAMES)
            raise SpecError(f"codec {self.name!r} is unknown; choose from: {known}")
        elif not 1 <= self.bits <= MAX_BITS:
            raise SpecError(
                f"{self.bits} bits per element is outside 1..{MAX_BITS}; {_ADVICE}"
            )

    @classmethod
    def of(cls, name: str, bits: int) -> CodecSpec:
        """The codec for ``bits``, where 16 means "keep this side as it is"."""
        return cls("identity", 16) if bits == 16 else cls(name, bits)

    def __str__(self) -> str:
        return f"{self.name}:{self.bits}"


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
        if self.adaptive and "identity" in (self.keys.name, self.values.name):
            raise SpecError("sides that stay uncompressed cannot be chosen for; use 3")

    @property
    def adaptive(self) -> bool:
        """Whether bits are still to be chosen, from the text."""
        return self.budget is not None or self.quality is not None

    @classmethod
    def parse(cls, text: str | float | CacheSpec, **overrides: Any) -> CacheSpec:
        """Read ``3``, ``"3.5"``, ``"k4v3"`` or ``"k4v3,window=64,center=off"``.

        A half step is the mean of the two sides: 3.5 is ``k4v3``, because error
        in the keys costs more than error in the values. Any other mean, such as
        3.25, is met on average over the layers, whose bits are then chosen from the
        text; ``"auto,budget=3"`` says so of a whole number, ``"auto"`` alone aims at
        a ``quality`` (``"balanced"`` unless given).

        Args:
            text: The spec. A ready `CacheSpec` passes through.
            overrides: Fields that win over the text; ``None`` leaves one alone.
                ``codec=NAME`` picks the codec of both sides.

        Raises:
            SpecError: naming the part that cannot be read.
        """
        given = {k: v for k, v in overrides.items() if v is not None}
        if isinstance(text, CacheSpec):
            spec, codec = text, given.pop("codec", None)
            if codec is not None:
                sides = (spec.keys.bits, spec.values.bits)
                keys, values = (CodecSpec.of(codec, bits) for bits in sides)
                spec = replace(spec, keys=keys, values=values)
            return replace(spec, **given)
        head, *options = str(text).strip().lower().split(",")
        for option in options:
            name, value = _read_option(option)
            given.setdefault(name, value)
        codec = given.pop("codec", "turboquant")
        k_bits, v_bits, budget = _read_bits(head)
        if budget is not None:
            given["budget"] = budget
        elif head == "auto" and not {"budget", "quality"} & given.keys():
            given["quality"] = "balanced"
        elif head != "auto" and {"budget", "quality"} & given.keys():
            raise SpecError(
                f"budget= and quality= choose the bits, and {head} says them; "
                "write 'auto' in its place"
            )
        return cls(CodecSpec.of(codec, k_bits), CodecSpec.of(codec, v_bits), **given)

    def __str__(self) -> str:
        return self._text(full=False)

    @property
    def full(self) -> str:
        """The text with every field spelled out, as written into files."""
        return self._text(full=True)

    def _text(self, full: bool) -> str:
        parts = [f"k{self.keys.bits}v{self.values.bits}"]
        if self.adaptive:
            parts = ["auto"]
        codec = next(
            (s.name for s in (self.keys, self.values) if s.name != "identity"), ""
        )
        if full or codec != "turboquant":
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


def _read_bits(head: str) -> tuple[int, int, float | None]:
    """Bits of keys and values, and the mean to meet if they are to be chosen."""
    if head == "auto":
        return 3, 3, None
    if match := _SIDES.fullmatch(head):
        return int(match[1]), int(match[2]), None
    try:
        bits = float(head)
    except ValueError:
        raise SpecError(f"cannot read bits from {head!r}; {_ADVICE}") from None
    if bits != bits or abs(bits) > 32:
        raise SpecError(f"{head} bits per element is not possible; {_ADVICE}")
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

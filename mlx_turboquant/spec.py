"""Options, checked once: `CodecSpec` for one side, `CacheSpec` for a whole cache.

The limits of every option are here; their text form (``"k4v3,window=64"``) is
`spec_text`'s, what a codec allows is `codecs.registry`'s. Inside the package a spec is
already right and is never checked again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from .codecs.registry import IDENTITY, codec_info, codec_names
from .errors import SpecError, shown
from .spec_text import ADVICE, DEFAULT_CODEC, read_spec, side_names, write_spec

CENTERS = ("page", "off")
QUALITIES = ("lossless", "balanced", "small")
EVICTIONS = ("sliding", "score")
_LIMITS = {"sink": (0, 1024), "window": (0, 65536), "page": (32, 1024)}
#: Kernels read tokens in tiles of this many, which share a key mean.
_TILE = 32
#: Mean code bits that `cache.bit_allocation` can meet: its widths go from 2 to 8.
_BUDGETS = (2, 8)
_WHOLE_BITS = tuple(range(1, 9))


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """One side (keys or values) of a cache.

    Args:
        name: A codec's name (`codecs.registry`); ``"identity"`` keeps vectors as they
            are.
        bits: Code bits per element, scales not counted: one of the codec's widths, or
            16 for identity. Whole numbers are ints.

    Raises:
        SpecError: for an unknown name or a width that the codec has not.
    """

    name: str
    bits: float

    def __post_init__(self) -> None:
        widths = codec_info(self.name).widths
        if self.bits in widths:
            return
        if widths == _WHOLE_BITS:
            raise SpecError(f"{self.bits:g} bits per element is outside 1..8; {ADVICE}")
        shown = ", ".join(f"{width:g}" for width in widths)
        raise SpecError(
            f"{self.name} has no {self.bits:g} bits per element; use {shown}"
        )

    @classmethod
    def of(cls, name: str, bits: float) -> CodecSpec:
        """The codec for ``bits``, where 16 means "keep this side as it is"."""
        bits = int(bits) if bits == int(bits) else bits
        return cls(IDENTITY, 16) if bits == 16 else cls(name, bits)

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
            and ``window + page`` recent tokens are held at any time; behind a prompt
            of under 1,060 tokens, fewer than ``window + 32``.
        page: Tokens encoded together, a multiple of 32. The first page also decides
            the channels' gains.
        center: Key mean subtracted before quantizing: one per ``"page"``, or ``"off"``.
        equalize: Divide channels by gains measured on the first page.
        seed: Seed of the rotation signs (see ``docs/format.md``).
        evict: What ``max_kv_size`` drops: the oldest tokens (``"sliding"``), or the
            pages that score least (``"score"``, see `ScoredTurboQuantCache`), which
            are of 32 tokens in a text that does not say ``page=``.
        budget: Choose each layer's bits from the text's first page, so that they are
            this many on average, code bits per element. Until then ``keys`` and
            ``values`` only name the codec.
        quality: Choose each layer's bits likewise, as few as ``"lossless"``,
            ``"balanced"`` or ``"small"`` allows.

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
    evict: str = "sliding"
    budget: float | None = None
    quality: str | None = None

    def __post_init__(self) -> None:
        self._check_bits()
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise SpecError(
                    f"{name} {value} is outside {low}..{high}; "
                    f"leave it out for {_default(name)}"
                )
        if self.page % _TILE:
            raise SpecError(
                f"page {self.page} is not a multiple of {_TILE}; "
                f"use {self.page // _TILE * _TILE} or leave it out for "
                f"{_default('page')}"
            )
        if self.center not in CENTERS:
            raise SpecError(
                f"center={self.center} is unknown; use one of {', '.join(CENTERS)}"
            )
        if self.evict not in EVICTIONS:
            raise SpecError(
                f"evict={self.evict} is unknown; use one of {', '.join(EVICTIONS)}"
            )
        if not 0 <= self.seed < 2**32:
            raise SpecError(f"seed {self.seed} is outside 0..2**32-1; leave it out")
        if self.keys.name == self.values.name == IDENTITY:
            raise SpecError("k16v16 compresses nothing; lower one side, as in 'k16v4'")

    def _check_bits(self) -> None:
        low, high = _BUDGETS
        if self.budget is not None and not low <= self.budget <= high:
            raise SpecError(
                f"{self.budget:g} bits on average are outside {low}..{high}; {ADVICE}"
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
        if codec_info(self.values.name).keys_only:
            raise SpecError(
                f"{self.values.name} only estimates inner products, which values are "
                f"not read by; write codec={self.values.name}/{DEFAULT_CODEC}"
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
        changes = {k: v for k, v in overrides.items() if v is not None}
        if isinstance(text, CacheSpec):
            if "codec" in changes:
                names = side_names(changes.pop("codec"))
                changes["keys"] = CodecSpec.of(names[0], text.keys.bits)
                changes["values"] = CodecSpec.of(names[1], text.values.bits)
            return replace(text, **changes)
        try:
            written = str(text)
        except ValueError as error:  # Python writes no number of so many digits
            raise SpecError(f"cannot read bits from {shown(text)}; {ADVICE}") from error
        names, bits, options = read_spec(written, changes)
        if {"budget", "quality"} & options.keys():
            _check_adaptive(names)  # before a width is asked of them that they have not
        keys, values = map(CodecSpec.of, names, bits)
        return cls(keys, values, **options)

    def __str__(self) -> str:
        return self._write(full=False)

    @property
    def full(self) -> str:
        """The text with every field spelled out, as written into files."""
        return self._write(full=True)

    def _write(self, full: bool) -> str:
        options = {
            field.name: getattr(self, field.name)
            for field in fields(self)[2:]
            if full or getattr(self, field.name) != field.default
        }
        names = (self.keys.name, self.values.name)
        return write_spec(names, (self.keys.bits, self.values.bits), options, full)


def _default(name: str) -> Any:
    return next(f.default for f in fields(CacheSpec) if f.name == name)


def _check_adaptive(names: tuple[str, str]) -> None:
    for name in names:
        if not codec_info(name).adaptive:
            choices = [n for n in codec_names() if codec_info(n).adaptive]
            raise SpecError(
                f"bits of codec {name} cannot be chosen from the text; say "
                f"them, as in 3, or use codec={' or codec='.join(choices)}"
            )

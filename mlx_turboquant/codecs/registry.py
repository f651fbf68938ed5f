"""Which codecs there are, and what each says of itself: `CodecInfo`.

A codec is one file that calls `register_codec`; widths, sides and costs are said there
and nowhere else. This module imports neither MLX nor a codec: those of this package
are imported when a name is looked up for the first time.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import SpecError

if TYPE_CHECKING:
    from ..spec import CodecSpec
    from .base import Codec, Side

    Builder = Callable[[CodecSpec, int, Side, int], Codec]
    Choices = Callable[[int], Sequence[tuple[CodecSpec, float]]]

#: Vectors kept as they are. Specs spell it as 16 bits, so no list of names has it.
IDENTITY = "identity"
#: Names of comparisons begin with this; what they store is promised to no one.
RESEARCH = "research."
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_infos: dict[str, CodecInfo] = {}


@dataclass(frozen=True)
class CodecInfo:
    """What the rest of the package needs to know of a codec before it is built.

    Args:
        name: As in ``codec=NAME``: lower-case letters, digits, dots and dashes.
        widths: Code bits per element that it can have, ascending; scales not counted.
        build: Makes the codec from (spec, dim, side, seed of the rotation). It raises
            `UnsupportedError` for a dim that it cannot do.
        keys_only: Whether it only estimates inner products, so that values need
            another codec.
        choices: For codecs whose bits can be chosen by layer (`cache.bit_allocation`):
            given a dim, the specs to choose from and the relative squared error of
            each, the coarsest first.
        read_cost: Time of attention over its codes, over that of reading as many bytes
            of fp16, as measured; None if nobody has.
    """

    name: str
    widths: tuple[float, ...]
    build: Builder
    keys_only: bool = False
    choices: Choices | None = None
    read_cost: float | None = None

    @property
    def adaptive(self) -> bool:
        """Whether its bits can be chosen by layer."""
        return self.choices is not None


def register_codec(info: CodecInfo) -> None:
    """Make a codec available by name: in specs, caches, files and `tq.evaluate`.

    Registering a name again from the same module replaces the codec, as running a
    notebook's cell twice does.

    Raises:
        SpecError: for a name that specs cannot spell or that another module has taken.
    """
    if not _NAME.fullmatch(info.name):
        raise SpecError(
            f"codec name {info.name!r} cannot be written in a spec; use lower-case "
            "letters, digits, dots and dashes"
        )
    home = info.build.__module__
    if not home.startswith(f"{__package__}."):
        # From outside: this package's own names are taken, whoever comes first.
        _import_modules(__package__)
    known = _infos.get(info.name)
    if known is not None and known.build.__module__ != home:
        raise SpecError(
            f"codec name {info.name!r} is taken by {known.build.__module__}; "
            f"{home} must choose another"
        )
    _infos[info.name] = info
    codec_for.cache_clear()


def codec_info(name: str) -> CodecInfo:
    """What is known of the codec called ``name``.

    Raises:
        SpecError: if there is none.
    """
    _import_modules(__package__)
    if name.startswith(RESEARCH):
        _import_modules(f"{__package__}.research")
    info = _infos.get(name)
    if info is not None:
        return info
    if RESEARCH + name in codec_names(research=True):
        raise SpecError(
            f"codec {name!r} is a comparison, not for use; its name is {RESEARCH}{name}"
        )
    names = ", ".join(codec_names())
    raise SpecError(f"codec {name!r} is unknown; choose from: {names}")


def codec_names(research: bool = False) -> tuple[str, ...]:
    """Names that ``codec=`` takes, in the order of registration.

    Args:
        research: Whether to name the comparisons too.
    """
    _import_modules(__package__)
    if research:
        _import_modules(f"{__package__}.research")
    names = (name for name in _infos if name != IDENTITY)
    return tuple(n for n in names if research or not n.startswith(RESEARCH))


@functools.cache
def codec_for(spec: CodecSpec, dim: int, side: Side, seed: int = 0) -> Codec:
    """The codec for one side of a cache, built once per process.

    It takes and gives vectors (B, H, T, dim) that are rotated:
    ``codec.encode(codec.rotation.forward(x))``.

    Args:
        spec: Its name and bits.
        dim: Elements per vector.
        side: ``"keys"`` or ``"values"``: sides may differ in their scales.
        seed: Seed of the rotation's signs, 0..2**32-1.

    Raises:
        UnsupportedError: if the codec or its rotation cannot do ``dim``.
    """
    return codec_info(spec.name).build(spec, dim, side, seed)


@functools.cache
def _import_modules(package: str) -> None:
    """Import every module of a package, which makes its codecs register."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")

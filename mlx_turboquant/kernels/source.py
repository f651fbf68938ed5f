"""Kernel sources: finding ``metal/``, inlining includes, spelling them for CUDA.

Owns text only. The files are legal Metal Shading Language; a dialect puts its compat
header in front, and CUDA loses the address-space words that it does not have.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from pathlib import Path
from typing import Literal

Dialect = Literal["metal", "cuda"]

_INCLUDE = re.compile(r'^#include "([\w./]+)"\n', re.MULTILINE)
_SHARED = re.compile(r"\bthreadgroup (\w+) (\w+\[)")
_NOISE = re.compile(r"[ \t]*//[^\n]*|^[ \t]+|\n(?=\s*\n)", re.MULTILINE)
_ADDRESS_SPACES = re.compile(r"\b(device|constant|threadgroup|thread)\s+(?=[\w])")


def metal_folder() -> Path:
    """Where the ``.metal`` files are: in the wheel, or beside a checkout's package."""
    package = Path(str(files("mlx_turboquant")))
    shipped = package / "_metal"
    return shipped if shipped.is_dir() else package.parent / "metal"


@functools.cache
def header(name: str, dialect: Dialect) -> str:
    """The text of one source with everything it includes, once each, compat first.

    Without comments and indentation: MLX reads it through on every launch, which at
    20 kB was seen to cost 9 us.
    """
    compat = (metal_folder() / "compat" / f"{dialect}.h").read_text()
    text = compat + spell(_inline(name, set()), dialect)
    return _NOISE.sub("", text).lstrip()


def _inline(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    text = (metal_folder() / name).read_text()
    return _INCLUDE.sub(lambda match: _inline(match[1], seen), text)


def spell(text: str, dialect: Dialect) -> str:
    """Metal text in a dialect; Metal itself is left as it is."""
    if dialect == "metal":
        return text
    return _ADDRESS_SPACES.sub("", _SHARED.sub(r"__shared__ \1 \2", text))

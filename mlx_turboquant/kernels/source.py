"""Kernel sources: finding ``metal/``, inlining includes, spelling them for CUDA.

A source is Metal Shading Language but for three words of ours:

    #include "compat/base.h"    ``compat/metal/base.h`` or ``compat/cuda/base.h``
    #include "arguments.h"      the kernel's argument struct (`kernels.arguments`)
    TQ_ENTRY(name) {            at the end of a ``.metal`` file: the body of a kernel,
      ...                       in which the names of its `Kernel`'s inputs, outputs
    }                           and template arguments are declared

MLX writes an entry's signature: its body is what ``mx.fast.metal_kernel`` takes as
``source``, the rest of its file the ``header``. An entry declares threadgroup memory,
finds this threadgroup's part of the buffers and makes one call. An input's
``<name>_strides`` have to stand in the body: MLX passes those that it finds there, and
does not look at headers.

Both texts lose comments and indentation, since MLX reads them through on every launch,
which at 20 kB was seen to cost 9 us. So a source includes only what it uses.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from .arguments import struct_text

Dialect = Literal["metal", "cuda"]

_INCLUDE = re.compile(r'^#include "([\w./]+)"\n', re.MULTILINE)
_ENTRY = re.compile(r"^TQ_ENTRY\((\w+)\) \{\n(.*?)^\}\n", re.MULTILINE | re.DOTALL)
_SHARED = re.compile(r"\bthreadgroup (\w+) (\w+\[)")
_ADDRESS_SPACES = re.compile(r"\b(device|constant|threadgroup|thread)\s+(?=[\w])")
_COMMENTS_AND_INDENTATION = re.compile(
    r"[ \t]*//[^\n]*|^[ \t]+|\n(?=\s*\n)", re.MULTILINE
)


def metal_folder() -> Path:
    """Where the ``.metal`` files are: in the wheel, or beside a checkout's package."""
    package = Path(str(files("mlx_turboquant")))
    shipped = package / "_metal"
    return shipped if shipped.is_dir() else package.parent / "metal"


def header(
    file: str,
    dialect: Dialect,
    arguments: type[NamedTuple],
    omitted: frozenset[str] = frozenset(),
) -> str:
    """All of a source but its entries, and what it includes, once each.

    ``omitted`` files are left out.
    """
    text = _inline(file, dialect, arguments, set(omitted))
    return _spell(_ENTRY.sub("", text), dialect)


def body(file: str, name: str, dialect: Dialect) -> str:
    """What is between the braces of the entry ``name``."""
    entries: dict[str, str] = dict(_ENTRY.findall((metal_folder() / file).read_text()))
    return _spell(entries[name], dialect)


def _inline(
    file: str, dialect: Dialect, arguments: type[NamedTuple], included: set[str]
) -> str:
    if file in included:
        return ""
    included.add(file)
    if file == "arguments.h":
        return struct_text(arguments)
    text = (metal_folder() / file.replace("compat/", f"compat/{dialect}/")).read_text()
    return _INCLUDE.sub(
        lambda match: _inline(match[1], dialect, arguments, included), text
    )


def _spell(text: str, dialect: Dialect) -> str:
    """A source's text in a dialect, without what only readers need."""
    text = _COMMENTS_AND_INDENTATION.sub("", text).lstrip()
    if dialect == "cuda":
        text = _ADDRESS_SPACES.sub("", _SHARED.sub(r"__shared__ \1 \2", text))
    return text

"""Metal texts as C++14 for clang, with address spaces that do not convert.

Metal 3 is C++14, and its device, threadgroup, constant and thread pointers are four
types; the simulator's C++ for OpenCL is C++17 and has a generic one besides. Owns the
few rewritings between the two, and the compiler's flags. What Metal itself declares is
``portable.h``; MLX's prelude is left out, since nothing of ours is of it.

A pointer without any address space is one to thread memory here, and an error in
Metal: the simulator looks for those (`metalsim.check`).
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from metalsim.build import clean, find_clang

from .specialisations import Specialisation
from .texts import entry_text

_HERE = Path(__file__).parent
#: ``[[buffer(0)]]`` and the like, but for the one that makes a kernel.
_ATTRIBUTE = re.compile(r"\s*\[\[(?!kernel\]\])[^\]]*\]\]")
#: A position as an argument: in ``portable.h`` it is a name.
_POSITION = re.compile(
    r",?\s*uint3? (\w+) \[\[(?:thread|simdgroup|threadgroup)_\w+\]\]"
)
#: Of a threadgroup, so of no function's call: C++ says ``static``.
_SHARED = re.compile(r"^threadgroup (\w+) (\w+\[)", re.MULTILINE)
#: A struct written at once: C++ has no assignment to another address space.
_STORE = re.compile(r"\*reinterpret_cast<(device [\w<>, ]+\*)>\((\w+)\) = (\w+);")

FLAGS = [
    *(
        "-x",
        "c++",
        "-std=c++14",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
    ),
    # Of arguments that one template uses and another does not.
    *("-Wno-unused-variable", "-Wno-unused-but-set-variable", "-Wno-unused-function"),
    *("-Wno-unused-const-variable", "-Wdouble-promotion"),
    # A loop that the other dialect unrolls.
    "-Wno-pass-failed",
    *("-ffp-contract=on", "-fno-exceptions", "-fno-rtti", f"-I{_HERE}"),
]


@dataclass(frozen=True)
class Refused:
    """What clang said of the texts of one header."""

    kernel: str
    messages: str


def portable_text(header: str, entries: Iterable[str]) -> str:
    """One translation unit of the entries that share a header."""
    header = _STORE.sub(r"msl_store(reinterpret_cast<\1>(\2), \3);", header)
    parts = ['#include "portable.h"', '#line 1 "tq.header"', header]
    for number, entry in enumerate(entries):
        parts += [f'#line 1 "tq.entry.{number}"', portable_entry(entry)]
    return "\n".join(parts)


def portable_entry(entry: str) -> str:
    """An entry's signature, body and instantiation in C++14."""
    text = _SHARED.sub(r"static threadgroup \1 \2", _POSITION.sub("", entry))
    text = _ATTRIBUTE.sub("", text)
    # Not where it is instantiated: it is part of the template there.
    head, _, rest = text.partition("[[kernel]]")
    return f"{head}kernel{rest.replace('[[kernel]]', '')}"


def refusals(made: Iterable[Specialisation]) -> list[Refused]:
    """What clang refuses of these, header by header; empty if it takes all of them."""
    by_header: dict[str, dict[str, str]] = defaultdict(dict)
    for one in made:
        header, entry = entry_text(one)
        by_header[header].setdefault(entry, one.kernel.name)
    found = []
    for header, entries in by_header.items():
        messages = errors_of(portable_text(header, entries))
        if messages:
            found.append(Refused(next(iter(entries.values())), messages))
    return found


def errors_of(text: str) -> str:
    """What clang says against a translation unit, or ""."""
    command = [find_clang()[0], *FLAGS, "-fsyntax-only", "-ferror-limit=5", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    return clean(done.stderr) if done.returncode else ""

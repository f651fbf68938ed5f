"""The whole text of a specialisation, as MLX hands it to Metal.

That is MLX's own prelude (``utils.h`` of the installed wheel, with what it includes),
our header, and the entry with its signature and instantiation, which
`metalsim.core.generate` writes as MLX does. Owns no list of them (`specialisations`).

    PYTHONPATH=tests python -m metaltext FOLDER
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from metalsim import core
from metalsim.build import mlx_include_root

from .specialisations import Specialisation

_INCLUDE = re.compile(r'^#include "([\w./]+)"\n', re.MULTILINE)
_UTILS = "mlx/backend/metal/kernels/utils.h"


@functools.cache
def prelude() -> str:
    """What stands before every kernel of ``mx.fast.metal_kernel``.

    MLX preprocesses it when it is built; here its files are joined, which leaves the
    choice between versions of the language to the compiler, as MLX's does.
    """
    joined = _joined(_UTILS, set()).replace("#pragma once\n", "")
    return f"#define MLX_METAL_JIT 1\n{joined}"


def _joined(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    text = (Path(mlx_include_root()) / name).read_text()
    return _INCLUDE.sub(lambda match: _joined(match[1], seen), text)


def entry_text(made: Specialisation) -> tuple[str, str]:
    """Our header; and the entry with signature and instantiation."""
    header = made.kernel.header("metal")
    inputs = [
        core.Arr(
            np.broadcast_to(np.zeros((), np.uint8), _shape(b.ndim, b.size)), b.dtype
        )
        for b in made.inputs
    ]
    text = core.generate(
        f"tq_{made.kernel.name}",
        list(made.kernel.inputs),
        list(made.kernel.outputs),
        made.kernel.body("metal"),
        header,
        list(made.template),
        inputs,
        [core.dtype_name(dtype) for dtype in made.outputs],
    )[0]
    return header, text.removeprefix(header)


def _shape(ndim: int, size: int) -> tuple[int, ...]:
    return (1,) * (ndim - 1) + (size,) if ndim else ()


def full_text(made: Specialisation) -> str:
    """All of it; messages of a compiler name the part and its line."""
    header, entry = entry_text(made)
    parts = {"mlx.prelude": prelude(), "tq.header": header, "tq.entry": entry}
    return "".join(f'#line 1 "{name}"\n{text}\n' for name, text in parts.items())


def file_name(made: Specialisation) -> str:
    """A name of its own, the same for the same text."""
    digest = hashlib.sha256("".join(entry_text(made)).encode()).hexdigest()
    return f"{made.kernel.name}-{digest[:12]}.metal"


def write(made: Iterable[Specialisation], folder: Path) -> dict[Path, str]:
    """Write each to ``folder``, and ``index.txt``; what each file is."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for one in made:
        path = folder / file_name(one)
        path.write_text(full_text(one))
        index[path] = one.name
    lines = [f"{path.name}: {name}\n" for path, name in index.items()]
    (folder / "index.txt").write_text("".join(lines))
    return index

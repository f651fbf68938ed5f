"""Another package with this one's folder: somebody else's ``mlx-turboquant``.

Owns the refusal to run where both, or an install of ours from before it was called
``mlx-tq``, are in one place. All write into ``mlx_turboquant/``, so some modules are of
one and some of the other, and uninstalling one takes files of the other: what such a
mixture computes is anybody's guess, and an error at import the only place to say it
before numbers come out. Imports nothing that is not loaded already, and none of our
modules, which may be theirs. Where their ``__init__`` was written over ours, nothing of
ours runs at ``import mlx_turboquant``: then only commands say it.
"""

from __future__ import annotations

import os
import sys

#: How the metadata folder of that distribution begins, and ours does not.
_THEIRS = "mlx_turboquant-"


def refuse_namesake(package: str) -> None:
    """Look for ``mlx-turboquant`` beside this package's folder.

    One listing of the folder that the package is in: ``importlib.metadata`` would
    take longer to import than all of this package does. A checkout, or an editable
    install of one, has no such metadata beside it.

    Args:
        package: The folder of the package.

    Raises:
        ImportError: if files of that distribution are in ``package``.
        SystemExit: the same in one of our commands, said on stderr as a command's
            errors are: one line, code 2.
    """
    said = _mixture(package)
    if said is None:
        return
    if _is_command(package):
        sys.stderr.write(f"error: {said}\n")
        raise SystemExit(2)
    raise ImportError(said)


def _is_command(package: str) -> bool:
    """Whether ``mlx_tq`` or ``python -m mlx_turboquant`` is what is run.

    While the package of what ``-m`` names is imported, that stands in place of a path.
    """
    program = next(iter(sys.argv), "")
    return (
        program in ("-m", os.path.join(package, "__main__.py"))
        or os.path.basename(program).partition(".")[0] == "mlx_tq"
    )


def _mixture(package: str) -> str | None:
    """What to say of another distribution's files in ``package``; None without any."""
    site, folder = os.path.split(package)
    try:
        names = os.listdir(site)
    except OSError:  # in an archive, for one
        return None
    for name in names:
        if name.startswith(_THEIRS) and name.endswith(".dist-info"):
            if not _writes_into(folder, os.path.join(site, name, "RECORD")):
                continue
            return (
                f"two distributions share the folder {package}: this one, mlx-tq, and "
                f"mlx-turboquant {name[len(_THEIRS) : -len('.dist-info')]} (somebody "
                "else's, or this one before it was renamed), so that their files are "
                "mixed; to have this one, run: pip uninstall -y mlx-turboquant && pip "
                "install --force-reinstall --no-deps mlx-tq (in a checkout . for "
                "mlx-tq)"
            )
    return None


def _writes_into(folder: str, record: str) -> bool:
    """Whether a distribution has files in ``folder``; taken for granted without list.

    An editable install may have none.
    """
    try:
        with open(record, encoding="utf-8") as lines:
            return any(line.startswith(f"{folder}/") for line in lines)
    except OSError:
        return True

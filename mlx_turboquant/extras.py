"""Packages of our extras, and what to say where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import UnsupportedError


def need(extra: str, what: str, *packages: str) -> None:
    """Make sure that an extra's packages are installed.

    Args:
        extra: The extra's name.
        what: What needs them, for the error.
        packages: Their import names.

    Raises:
        UnsupportedError: if one is missing.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"{what} needs {', '.join(missing)}", f"pip install 'mlx-tq[{extra}]'"
        )

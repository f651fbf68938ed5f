"""Whether this machine has the clang that a check wants, and what to do if not.

Nothing is left out silently: a skip says what was not checked, and CI on Linux, where
``tests/system_packages.sh`` installs clang, must not skip.
"""

from __future__ import annotations

import os
import sys

import metalsim
import pytest


def require_clang(version: int | None = None) -> None:
    """Skip, or fail in CI on Linux, without clang 17 or later.

    Args:
        version: The very one that is wanted, LLVM's own: Apple counts otherwise.
    """
    if version is not None and sys.platform != "linux":
        _absent(f"numbers are those of clang {version} on Linux")
    try:
        found = metalsim.find_clang()[1]
    except metalsim.MetalSimError as error:
        _absent(str(error))
    else:
        if version is not None and found != version:
            _absent(f"numbers are clang {version}'s, and this one is {found}")


def _absent(reason: str) -> None:
    if os.environ.get("CI") and sys.platform == "linux":
        pytest.fail(f"CI must check the Metal texts: {reason}")
    pytest.skip(f"METAL TEXTS NOT CHECKED: {reason}")

"""Where a user's verdicts are: the cache folder of the home, or a spare one.

Without a home that can be written to, every process would check anew; then they are in
the folder for temporary files, which lasts until the machine starts again or longer.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

#: A folder that nobody can make: verdicts are this process's alone.
_NOWHERE = Path(os.devnull) / "proofs"


def cache_folder() -> Path:
    """The user's folder for verdicts; it may not exist, and cannot always be made."""
    home = _in_home()
    if home is not None and _can_be_made(home):
        return home
    spare = Path(tempfile.gettempdir()) / f"mlx_turboquant-{os.getuid()}"
    if _is_ours(spare):
        return spare
    return _NOWHERE if home is None else home


def _in_home() -> Path | None:
    """Where the system wants it; None if this user has no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # others are to be ignored, says its specification
        base = Path(given)
    else:
        home = Path(os.path.expanduser("~"))
        if not home.is_absolute() or home == home.parent:
            return None  # an empty $HOME expands to the root
        base = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "mlx_turboquant" / "proofs"


def _can_be_made(folder: Path) -> bool:
    """Whether this process can write to a folder, once it has made it."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    return False


def _is_ours(folder: Path) -> bool:
    """Whether nobody else could have put verdicts there: all may make it."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    is_private = not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and is_private

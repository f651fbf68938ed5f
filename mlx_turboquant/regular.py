"""Only files and folders are opened: a pipe waits for a writer, a device has no end.

Owns the one check that a path is neither. Whether it is there is its reader's to say.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def check_regular(path: Path) -> None:
    """Make sure that reading a path ends.

    Args:
        path: Of a file, a folder or nothing.

    Raises:
        OSError: if it is a pipe, a socket or a device; or as ``stat`` does, but not
            for a path where nothing is.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise OSError(errno.EINVAL, f"it is a {name}, no regular file", str(path))

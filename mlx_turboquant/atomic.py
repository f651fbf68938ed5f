"""Writing a file whole, or leaving the older one."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the end.

    It has the same name, in a folder of its own beside ``path``. If the block fails,
    nothing of it stays.

    Args:
        path: The file to write or to replace; its folder must exist.

    Raises:
        OSError: if there is something that is no file, such as a device.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is there and no file", str(path))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        yield written
        os.replace(written, path)

"""The folder that texts' codes are kept in, as the command line asks for it.

Owns ``--kv-dir`` and what goes with it, for all commands that have one. The folder
itself is ``conversations/disk.py``'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt

if TYPE_CHECKING:
    from ..conversations.disk import DiskFolder

KvDir = Annotated[
    str | None, typer.Option(help="Folder that idle texts' codes are kept in.")
]
KvDisk = Annotated[str, typer.Option(help="Bytes it may take.")]
KvDiskHourly = Annotated[
    str, typer.Option(help="Bytes written to it in an hour; 0 for none.")
]
Forget = Annotated[
    bool, typer.Option("--forget", help="Empty --kv-dir, and do nothing else.")
]
#: Defaults of `KvDisk` and `KvDiskHourly`.
DISK, HOURLY = "20GB", "10GB"


def opened(
    path: str | None,
    size: str,
    hourly: str,
    forget: bool,
    spec: CacheSpec | None,
    max_kv_size: int | None,
) -> DiskFolder | None:
    """What ``--kv-dir`` and its limits ask for; None without it.

    Args:
        path: ``--kv-dir``.
        size: ``--kv-disk``.
        hourly: ``--kv-disk-hourly``.
        forget: ``--forget``: the folder is emptied and the command ends.
        spec: What caches store.
        max_kv_size: ``--max-kv-size``.

    Raises:
        SpecError: if the folder cannot be used, or not with these options.
        typer.Exit: if it was emptied.
    """
    limit, most = opt.size("--kv-disk", size), opt.size("--kv-disk-hourly", hourly)
    assert limit is not None, "it has a default"
    if path is None:
        if forget:
            raise SpecError("--forget needs --kv-dir, the folder to empty")
        return None
    if not path.strip():
        raise SpecError("--kv-dir is empty; name a folder, . for this one")
    if not forget and spec is None:
        raise SpecError("--kv-dir keeps codes: add for example --kv-bits 3")
    if not forget and max_kv_size is not None:
        raise SpecError(
            f"--kv-dir keeps whole texts, --max-kv-size {max_kv_size} drops what is "
            "older; leave one of them out"
        )
    try:
        folder = Path(path).expanduser()
    except RuntimeError:  # a user that is not there
        raise SpecError(
            f"--kv-dir {path} begins with the home of nobody here; name another folder"
        ) from None

    from ..conversations.catalog import INDEX
    from ..conversations.disk import DiskFolder

    if forget and not (folder / INDEX).is_file():
        raise SpecError(f"there are no kept texts in {folder}; name another --kv-dir")
    opened = DiskFolder(folder, limit, most)
    if forget:
        typer.echo(f"{decimal(opened.forget())} forgotten")
        raise typer.Exit
    return opened

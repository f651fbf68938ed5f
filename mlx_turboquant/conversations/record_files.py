"""Files of records: appended to, mapped, checked.

Owns the bytes of `Record`s, one behind the other, and what they are checked by. Which
records there are, and in which file, is the `catalog`'s; which may be, the `disk`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .catalog import Row
from .records import Bytes


@dataclass(frozen=True)
class Record:
    """Something to write.

    Attributes:
        key: A hash of all it depends on.
        parent: The key that it is found from.
        kind: Its kind among those with that parent.
        data: Its bytes, in turn.
        note: What is to be known without reading it.
        goes_on: Whether other records go on from it.
    """

    key: bytes
    parent: bytes
    kind: int
    data: Sequence[memoryview]
    note: bytes = b""
    goes_on: bool = True

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return sum(part.nbytes for part in self.data)


def digest_of(key: bytes, data: Sequence[memoryview]) -> bytes:
    """What a record's bytes are checked by: BLAKE2b of its key and of them."""
    digest = hashlib.blake2b(key, digest_size=16)
    for part in data:
        digest.update(part.cast("B"))
    return digest.digest()


def append(path: Path, start: int, records: Sequence[Record]) -> list[Row]:
    """Add records to a file; they are on the disk when this returns.

    Args:
        path: The file, made if it is not there.
        start: Its bytes.
        records: What to add.

    Raises:
        OSError: if they cannot be written; the file is as before.
    """
    rows, at = list[Row](), start
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        with open(descriptor, "ab", closefd=False) as out:
            for one in records:
                for part in one.data:
                    out.write(part)
                place = at, one.size, digest_of(one.key, one.data)
                rows.append((one.key, one.parent, one.kind, one.note, *place))
                at += one.size
        os.fsync(descriptor)
    except OSError:
        # What was written of it is behind the end that anybody knows of.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, start)
        raise
    finally:
        os.close(descriptor)
    return rows


class Maps:
    """Files of a folder, mapped when they are first asked for.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def bytes_of(self, name: str, start: int, size: int) -> Bytes | None:
        """A record's bytes; None if somebody cut the file.

        Raises:
            OSError, ValueError: if the file is not there, or cannot be mapped.
        """
        path = self._folder / name
        if name not in self._maps:
            with path.open("rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[name] = mapped
        mapped = self._maps[name]
        # What is gone of a file cannot be touched.
        if min(path.stat().st_size, len(mapped)) < start + size:
            return None
        return np.frombuffer(mapped, np.uint8, size, start)

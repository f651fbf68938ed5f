"""`DiskFolder`: records that outlive the process, in append-only files.

A record is bytes under a key, found again by its key or by its parent's. A process only
appends to files that it made, and names a record in the `Catalog` when its bytes are on
the disk: whatever is cut short was never there, and servers that share a folder write
to files of their own. Every read is checked. What fails is a line in the log and a
record that is not there. The least recently used files go when the limit is reached.

The folder is its owner's alone; names of files are random, keys are hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from ..errors import SpecError
from .catalog import INDEX, Catalog, Row
from .records import Bytes

_SUFFIX = ".kv"
#: A file is added to until it has so many bytes, or an eighth of the folder's.
FILE_BYTES = 64 << 20
#: Seconds without writing after an error.
_PAUSE = 60.0


@dataclass(frozen=True)
class Record:
    """Something to write.

    Attributes:
        key: A hash of all it depends on.
        parent: The key that it is found from.
        kind: Its kind among those with that parent.
        data: Its bytes, in turn.
        note: What is to be known without reading it.
    """

    key: bytes
    parent: bytes
    kind: int
    data: Sequence[memoryview]
    note: bytes = b""

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


class DiskFolder:
    """Records in a folder, which one thread at a time uses.

    Args:
        folder: It is made if it is not there.
        limit: Bytes that its files may take.
        hourly: Bytes that may be written within an hour, by all who use the folder;
            None for any number, 0 to read only.

    Raises:
        SpecError: if the folder cannot be used, or holds something else.
    """

    def __init__(
        self, folder: str | Path, limit: int, hourly: int | None = None
    ) -> None:
        self.folder = folder = Path(folder)
        self.limit, self.hourly = limit, hourly
        self._catalog = Catalog(folder)
        # Files of this process that can still be added to: end, name, bytes.
        self._ends: dict[int, tuple[bytes, str, int]] = {}
        self._paused_until = 0.0
        self._told_hour = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = os.listdir(folder)
            if names and INDEX not in names:
                raise SpecError(
                    f"--kv-dir {folder} holds other files; give a new or an empty "
                    "folder"
                )
            folder.chmod(0o700)
        except OSError as error:
            raise SpecError(
                f"--kv-dir {folder} cannot be used ({error.strerror}); give a folder "
                "that you may write to"
            ) from error
        self._check()
        self.close()  # this may be another thread than the one that uses it

    # Reading.

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of these keys, from the first on, have records."""
        with self._errors("read"):
            count = 0
            while count < len(keys) and self._catalog.has(keys[count]):
                count += 1
            # What a text goes on from is not the first to go.
            self._catalog.touch(keys[:count])
            return count
        return 0

    def children(self, parent: bytes, kind: int) -> list[tuple[bytes, bytes]]:
        """(key, note) of a parent's records of a kind."""
        with self._errors("read"):
            return self._catalog.children(parent, kind)
        return []

    def read(self, keys: Sequence[bytes]) -> list[Bytes] | None:
        """Bytes of records, mapped from their files; None if one is not right.

        That one is forgotten.
        """
        found: list[Bytes] = []
        digests: list[tuple[str, bytes]] = []
        maps: dict[str, mmap.mmap] = {}
        with self._errors("read"):
            for key in keys:
                row = self._catalog.find(key)
                data = None if row is None else self._mapped(maps, *row[:-1])
                if row is None or data is None:
                    self._catalog.forget(key)
                    return None
                found.append(data)
                digests.append((row[1], row[-1]))
            # Hashing takes longer than reading, and lets other threads run.
            with ThreadPoolExecutor() as pool:
                right = pool.map(digest_of, keys, ([data.data] for data in found))
                for key, digest, (name, wanted) in zip(
                    keys, right, digests, strict=True
                ):
                    if digest != wanted:
                        logging.warning(
                            f"KV folder: {self.folder / name} is damaged; what it held "
                            "is read again"
                        )
                        self._catalog.forget(key)
                        return None
            self._catalog.touch(keys)
            return found
        return None

    def _mapped(
        self,
        maps: dict[str, mmap.mmap],
        file: int,
        name: str,
        start: int,
        size: int,
    ) -> Bytes | None:
        path = self.folder / name
        try:
            if name not in maps:
                with path.open("rb") as opened:
                    maps[name] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            # Of a file that somebody cut, what is gone cannot be touched.
            is_short = path.stat().st_size < start + size
            is_short = is_short or len(maps[name]) < start + size
        except (OSError, ValueError) as error:
            logging.warning(f"KV folder: cannot read {path} ({error}); a miss")
            self._catalog.drop_file(file)
            return None
        if is_short:
            logging.warning(f"KV folder: {path} is damaged; what it held is read again")
            return None
        return np.frombuffer(maps[name], np.uint8, size, start)

    # Writing.

    def write(
        self, records: Sequence[Record], behind: bytes = b"", end: bytes = b""
    ) -> bool:
        """Write records that are not there yet; whether all are there now.

        Args:
            records: What should be there.
            behind: What they go on from: they share a file that has this as its end.
            end: What the next ones would go on from.
        """
        with self._errors("write"):
            new = [record for record in records if not self._catalog.has(record.key)]
            self._catalog.touch(record.key for record in records)
            size = sum(record.size for record in new)
            if size and not self._may_write(size):
                return False
            if new:
                self._make_room(size)
                self._append(new, behind, end)
            return True
        return False

    def _may_write(self, size: int) -> bool:
        hour = int(time.time() // 3600)
        if size > self.limit:
            logging.info(
                f"KV folder: {decimal(size)} of a text do not fit in --kv-disk "
                f"{decimal(self.limit)}"
            )
            return False
        if time.monotonic() < self._paused_until:
            return False
        written = self._catalog.written(hour)
        if self.hourly is None or written + size <= self.hourly:
            return True
        if self.hourly and self._told_hour != hour:
            self._told_hour = hour
            logging.info(
                f"KV folder: {decimal(written)} were written within this hour, and "
                f"{decimal(size)} more of a text would be above --kv-disk-hourly "
                f"{decimal(self.hourly)}; it waits for the next"
            )
        return False

    def _make_room(self, size: int) -> None:
        """Drop the files that were not used for longest."""
        for file, name in self._catalog.files.items():
            if self._catalog.nbytes + size <= self.limit:
                return
            self._catalog.drop_file(file)
            (self.folder / name).unlink(missing_ok=True)

    def _append(self, records: Sequence[Record], behind: bytes, end: bytes) -> None:
        file, name, start = self._file_behind(behind)
        path, rows, at = self.folder / name, list[Row](), start
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            with open(descriptor, "ab", closefd=False) as out:
                for one in records:
                    for part in one.data:
                        out.write(part)
                    digest = digest_of(one.key, one.data)
                    place = at, one.size, digest
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
        self._catalog.add(file, rows, at, int(time.time() // 3600))
        self._ends[file] = end, name, at

    def _file_behind(self, behind: bytes) -> tuple[int, str, int]:
        """(id, name, bytes) of the file to add to: a new one, if none ends there."""
        most, files = min(FILE_BYTES, self.limit // 8), self._catalog.files
        for file, (end, name, size) in list(self._ends.items()):
            path = self.folder / name
            # Another server may have dropped it, or somebody cut it.
            if file not in files or not path.exists() or path.stat().st_size != size:
                del self._ends[file]
            elif behind and end == behind and size < most:
                return file, name, size
        name = secrets.token_hex(8) + _SUFFIX
        return self._catalog.add_file(name), name, 0  # no file is without an entry

    # The folder as a whole.

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._errors("read"):
            return self._catalog.nbytes
        return 0

    def forget(self) -> int:
        """Empty the folder; returns the bytes that its files had."""
        size = 0
        with self._errors("write"):
            size = self._catalog.nbytes
            for file in self._catalog.files:
                self._catalog.drop_file(file)
        for path in self.folder.glob(f"*{_SUFFIX}"):
            path.unlink(missing_ok=True)
        return size

    def close(self) -> None:
        """Let another thread use it."""
        self._catalog.close()

    def _check(self) -> None:
        """Count what a killed process left; an unreadable index is begun anew."""
        try:
            for file, name in self._catalog.files.items():
                path = self.folder / name
                size = path.stat().st_size if path.is_file() else 0
                self._catalog.set_size(file, size)
        except sqlite3.OperationalError as error:
            logging.warning(f"KV folder: {self.folder} is busy ({error})")
        except sqlite3.DatabaseError as error:
            logging.warning(f"KV folder: its index is damaged ({error}); begun anew")
            self.close()
            for path in [*self.folder.glob(f"{INDEX}*"), *self.folder.glob("*.kv")]:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """What goes wrong is a line in the log; what follows is a miss."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            logging.warning(f"KV folder: cannot {doing} in {self.folder} ({error})")
            self._paused_until = time.monotonic() + _PAUSE
            self.close()

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
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.filesize import decimal

from ..errors import SpecError
from .catalog import INDEX, Catalog
from .record_files import Maps, Record, append, digest_of
from .records import Bytes

_SUFFIX = ".kv"
#: A file is added to until it has so many bytes, or an eighth of the folder's.
FILE_BYTES = 64 << 20
#: Bytes of records that are written together: a step of whoever waits meanwhile.
_AT_ONCE = 8 << 20
#: Seconds without writing after an error.
_PAUSE = 60.0


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
        self._file_bytes = min(FILE_BYTES, limit // 8)
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
        maps = Maps(self.folder)
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
        self, maps: Maps, file: int, name: str, start: int, size: int
    ) -> Bytes | None:
        path = self.folder / name
        try:
            found = maps.bytes_of(name, start, size)
        except (OSError, ValueError) as error:
            logging.warning(f"KV folder: cannot read {path} ({error}); a miss")
            self._catalog.drop_file(file)
            return None
        if found is None:
            logging.warning(f"KV folder: {path} is damaged; what it held is read again")
        return found

    # Writing.

    def write(self, records: Iterable[Record], behind: bytes = b"") -> bool:
        """Write records that are not there yet; whether all are there now.

        If not all may be written now, the first ones are: the others are not asked for.

        Args:
            records: What should be there, what is of most use first.
            behind: What they go on from: they share a file that ends with this.
        """
        with self._errors("write"):
            room, new, size = self._room(), list[Record](), 0
            all_fit, keys = True, list[bytes]()
            for record in records:
                keys.append(record.key)
                if self._catalog.has(record.key):
                    continue
                all_fit = record.size <= room
                if not all_fit:
                    self._tell(record.size)
                    break
                new.append(record)
                room, size = room - record.size, size + record.size
                if size >= min(self._file_bytes, _AT_ONCE):
                    behind = self._append(new, behind)
                    new, size = [], 0
            self._append(new, behind)
            self._catalog.touch(keys)
            return all_fit
        return False

    def _room(self) -> int:
        """Bytes that may be written now."""
        if time.monotonic() < self._paused_until:
            return 0
        if self.hourly is None:
            return self.limit
        return min(self.limit, self.hourly - self._catalog.written(_hour()))

    def _tell(self, size: int) -> None:
        """Say why a record of so many bytes is not written."""
        if size > self.limit:
            logging.info(
                f"KV folder: {decimal(size)} of a text do not fit in --kv-disk "
                f"{decimal(self.limit)}"
            )
        elif self.hourly and self._told_hour != _hour():
            self._told_hour = _hour()
            logging.info(
                f"KV folder: --kv-disk-hourly {decimal(self.hourly)} are written; "
                "more of texts in the next hour"
            )

    def _make_room(self, size: int) -> None:
        """Drop the files that were not used for longest."""
        self._sweep()
        for file, name in self._catalog.files.items():
            if self._catalog.nbytes + size <= self.limit:
                return
            self._catalog.drop_file(file)
            (self.folder / name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove files that are not in the index: dropped, but not removed.

        Such are left by who is killed between the two, and by a server whose file
        another one dropped while it was written to. A file is in the index before it
        is made, so that what is looked for in this order is nobody's.
        """
        there = list(self.folder.glob(f"*{_SUFFIX}"))
        counted = set(self._catalog.files.values())
        for path in there:
            if path.name not in counted:
                path.unlink(missing_ok=True)

    def _append(self, records: Sequence[Record], behind: bytes) -> bytes:
        """Write records behind a file's end, or to a new one; returns its new end."""
        if not records:
            return behind
        size = sum(one.size for one in records)
        self._make_room(size)
        file, name, start = self._file_behind(behind)
        rows = append(self.folder / name, start, records)
        if not self._catalog.add(file, name, rows, start + size, _hour()):
            # Another server dropped it meanwhile, and could not know of this.
            (self.folder / name).unlink(missing_ok=True)
            return self._append(records, b"")
        lasts = [one.key for one in records if one.goes_on]
        end = lasts[-1] if lasts else behind
        self._ends[file] = end, name, start + size
        return end

    def _file_behind(self, behind: bytes) -> tuple[int, str, int]:
        """(id, name, bytes) of the file to add to: a new one, if none ends there."""
        files = self._catalog.files
        for file, (end, name, size) in list(self._ends.items()):
            path = self.folder / name
            # Another server may have dropped it, or somebody cut it.
            gone = files.get(file) != name or not path.exists()
            if gone or path.stat().st_size != size:
                del self._ends[file]
            elif behind and end == behind and size < self._file_bytes:
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
        """Empty the folder; returns the bytes that its files had.

        Raises:
            SpecError: if it cannot be emptied: whoever asks wants to know.
        """
        try:
            size = self._catalog.nbytes
            for file in self._catalog.files:
                self._catalog.drop_file(file)
            self._sweep()
        except (OSError, sqlite3.Error) as error:
            raise SpecError(
                f"cannot empty {self.folder} ({error}); end what uses it and try again"
            ) from error
        return size

    def close(self) -> None:
        """Let another thread use it."""
        self._catalog.close()

    def _check(self) -> None:
        """Count what a killed process left; an unreadable index is begun anew."""
        try:
            self._sweep()
            for file, name in self._catalog.files.items():
                path = self.folder / name
                if path.is_file():  # one that is not may be just about to be
                    self._catalog.grow(file, path.stat().st_size)
        except sqlite3.OperationalError as error:
            logging.warning(f"KV folder: {self.folder} is busy ({error})")
        except sqlite3.DatabaseError as error:
            logging.warning(f"KV folder: its index is damaged ({error}); begun anew")
            self.close()
            old = [*self.folder.glob(f"*{_SUFFIX}"), *self.folder.glob(f"{INDEX}*")]
            for path in old:
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


def _hour() -> int:
    return int(time.time() // 3600)

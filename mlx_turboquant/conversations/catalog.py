"""`Catalog`: which records there are, and where in which file, in SQLite.

It is a transaction at a time, so that servers can share it and a killed one leaves it
whole. Files themselves are `disk`'s.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import SpecError

#: Its name in the folder; SQLite puts files beside it whose names begin so.
INDEX = "index.sqlite"
_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, bytes INTEGER, used REAL);
CREATE TABLE IF NOT EXISTS records (
    key BLOB PRIMARY KEY, parent BLOB, kind INTEGER, note BLOB,
    file INTEGER REFERENCES files ON DELETE CASCADE,
    start INTEGER, size INTEGER, digest BLOB) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_parent ON records (parent, kind);
CREATE INDEX IF NOT EXISTS by_file ON records (file);
CREATE TABLE IF NOT EXISTS written (hour INTEGER PRIMARY KEY, bytes INTEGER);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
#: Seconds to wait for another server's transaction.
_BUSY = 5.0

#: Seconds by which files of one text are apart.
_STEP = 1e-5

#: A record's key, parent, kind, note, start, size, digest.
Row = tuple[bytes, bytes, int, bytes, int, int, bytes]


class Catalog:
    """The records of a folder.

    Args:
        folder: The folder.

    Raises:
        sqlite3.Error: in all methods, if the index cannot be read or written.
        SpecError: likewise, if another version of this package wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX
        self._opened: sqlite3.Connection | None = None
        self._opened_as: tuple[int, int] | None = None

    @property
    def _index(self) -> sqlite3.Connection:
        if self._opened is not None and self._opened_as != self._on_disk:
            self.close()  # another server found it damaged, and began it anew
        if self._opened is None:
            index = sqlite3.connect(self._path, timeout=_BUSY)
            try:
                self._prepare(index)
            except BaseException:
                index.close()
                raise
            self._opened, self._opened_as = index, self._on_disk
        return self._opened

    def _prepare(self, index: sqlite3.Connection) -> None:
        index.execute("PRAGMA journal_mode=WAL")
        index.execute("PRAGMA synchronous=NORMAL")
        index.execute("PRAGMA foreign_keys=ON")
        index.execute("PRAGMA secure_delete=ON")  # notes hold ids of tokens
        version = index.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            index.executescript(_SCHEMA)
        elif version != _VERSION:
            raise SpecError(
                f"--kv-dir {self._path.parent} is of version {version}, this "
                f"package writes {_VERSION}; give another folder, or remove it"
            )

    @property
    def _on_disk(self) -> tuple[int, int] | None:
        """Which file has its name now."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):  # of another thread
            self.close()

    def close(self) -> None:
        """Close it; it is opened again by whoever asks next, in that one's thread."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def has(self, key: bytes) -> bool:
        """Whether there is a record."""
        found = self._index.execute("SELECT 1 FROM records WHERE key=?", (key,))
        return found.fetchone() is not None

    def find(self, key: bytes) -> tuple[int, str, int, int, bytes] | None:
        """A record's file, that one's name, its start, size and digest."""
        row: tuple[int, str, int, int, bytes] | None = self._index.execute(
            "SELECT id, name, start, size, digest FROM records JOIN files ON file=id "
            "WHERE key=?",
            (key,),
        ).fetchone()
        return row

    def children(self, parent: bytes, kind: int) -> list[tuple[bytes, bytes]]:
        """(key, note) of a parent's records of a kind."""
        return self._index.execute(
            "SELECT key, note FROM records WHERE parent=? AND kind=?", (parent, kind)
        ).fetchall()

    def touch(self, keys: Iterable[bytes]) -> None:
        """Records are in use now, those in front a little more than those behind.

        These are of no use without them, so their files are to go first.
        """
        index = self._index
        rows = (
            index.execute("SELECT file FROM records WHERE key=?", (key,)).fetchone()
            for key in keys
        )
        files = dict.fromkeys(row[0] for row in rows if row is not None)
        now = time.time()
        with index:
            index.executemany(
                "UPDATE files SET used=? WHERE id=?",
                [(now - _STEP * i, file) for i, file in enumerate(files)],
            )

    def forget(self, key: bytes) -> None:
        """A record is not to be found any more."""
        with self._index as index:
            index.execute("DELETE FROM records WHERE key=?", (key,))

    def add_file(self, name: str) -> int:
        """Name a new file; returns its id."""
        with self._index as index:
            return int(
                index.execute(
                    "INSERT INTO files (name, bytes, used) VALUES (?, 0, ?)",
                    (name, time.time()),
                ).lastrowid
                or 0
            )

    def add(
        self, file: int, name: str, rows: Sequence[Row], size: int, hour: int
    ) -> bool:
        """Name records of a file, which has ``size`` bytes with them.

        Returns:
            Whether the file is still there; if not, nothing is named.
        """
        inserted = [(*row[:4], file, *row[4:]) for row in rows]
        written = sum(row[5] for row in rows)
        with self._index as index:
            # Its name, too: an index that was begun anew counts from 1 again.
            found = index.execute(
                "UPDATE files SET bytes=?, used=? WHERE id=? AND name=?",
                (size, time.time(), file, name),
            )
            if not found.rowcount:
                return False
            index.executemany(
                "INSERT OR IGNORE INTO records VALUES (?,?,?,?,?,?,?,?)", inserted
            )
            index.execute(
                "INSERT INTO written VALUES (?, ?) "
                "ON CONFLICT (hour) DO UPDATE SET bytes=bytes+excluded.bytes",
                (hour, written),
            )
            index.execute("DELETE FROM written WHERE hour<?", (hour,))
        return True

    def written(self, hour: int) -> int:
        """Bytes that all servers wrote within an hour."""
        row = self._index.execute("SELECT bytes FROM written WHERE hour=?", (hour,))
        return int((row.fetchone() or (0,))[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        row = self._index.execute("SELECT coalesce(sum(bytes), 0) FROM files")
        return int(row.fetchone()[0])

    @property
    def files(self) -> dict[int, str]:
        """Names by id, the least recently used first."""
        rows = self._index.execute("SELECT id, name FROM files ORDER BY used, id")
        return dict(rows.fetchall())

    def grow(self, file: int, size: int) -> None:
        """Say how many bytes a file has, if they are more than is known."""
        with self._index as index:
            index.execute(
                "UPDATE files SET bytes=max(bytes, ?) WHERE id=?", (size, file)
            )

    def drop_file(self, file: int) -> None:
        """Forget a file and its records."""
        with self._index as index:
            index.execute("DELETE FROM files WHERE id=?", (file,))

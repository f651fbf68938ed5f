"""`PagePool`: room for pages of one layer's codes, shared by any number of sequences.

A page is a run of tokens: codes and scales of both sides, and the mean of its keys. Its
codes never depend on what comes after it, so sequences that begin alike can hold the
same pages (`page_table`). A page that nobody holds any more is free at once.

Owns buffers, places in them and how many hold each; what is written is its callers'.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .tokens import capacity_of

#: Tokens that a pool grows by, at least.
GROWTH = 128
#: A pool of at least so many pages gives its end back when half of it is free.
_SHRINKS_FROM = 64

Arrays = dict[str, mx.array]
#: (first, behind the last) of runs of consecutive pages.
Runs = tuple[tuple[int, int], ...]


class PagePool:
    """Buffers of pages, and how many sequences hold each.

    Args:
        page: Tokens of a page, a multiple of 32.

    Attributes:
        page: As given.
        groups: Arrays (B, H, capacity * rows of a page, w) by name, by group: keys,
            values, means. They are written in place, and new ones take their place when
            the pool grows: nobody should keep one.
        thread: Whose it is: what MLX has not computed yet belongs to a thread.
        lock: Held by whoever writes.
    """

    #: For tests: what nobody holds any more is overwritten, with NaN or all bits.
    poisons: ClassVar[bool] = False

    def __init__(self, page: int) -> None:
        self.page = page
        self.groups: dict[str, Arrays] = {}
        self._rows_of_page: dict[str, int] = {}
        self._holders: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.lock = threading.RLock()
        self.thread = threading.get_ident()
        # Pages of sequences that are gone. Python may collect them at any moment, also
        # in the middle of `take`.
        self._left_behind: deque[Runs] = deque()

    @property
    def capacity(self) -> int:
        """Pages that there is room for."""
        return len(self._holders)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        self._collect()
        return int(np.count_nonzero(self._holders))

    @property
    def is_sparse(self) -> bool:
        """Whether most of it is free, but not its end."""
        held, used = self.held, _behind_last(self._holders)
        return used >= _SHRINKS_FROM and held <= used // 2

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, free pages included."""
        self._collect()
        return sum(a.nbytes for arrays in self.groups.values() for a in arrays.values())

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return self.nbytes // max(1, self.capacity)

    def holders(self, pages: Sequence[int]) -> npt.NDArray[np.int32]:
        """Sequences that hold each of these pages."""
        self._collect()
        return self._holders[list(pages)]

    @property
    def all_holders(self) -> npt.NDArray[np.int32]:
        """Sequences that hold each page there is room for."""
        self._collect()
        return self._holders.copy()

    def take(self, count: int, behind: int | None = None) -> list[int]:
        """Pages for a sequence, which holds them alone; in one run, if there is one.

        Args:
            count: How many.
            behind: The page that the first should follow.
        """
        self.shrink()
        with self.lock:
            free: list[int] = np.flatnonzero(self._holders == 0).tolist()
            pages = _run_of(free, count, behind)
            if pages is None and len(free) >= count:
                pages = free[:count]
            if pages is None:
                first = _behind_last(self._holders)
                pages = list(range(first, first + count))
                self._resize(first + count)
            self._holders[pages] = 1
            return pages

    def lowest(self, count: int) -> list[int]:
        """As `take`, the first ones that are free, of which there must be as many."""
        with self.lock:
            pages: list[int] = np.flatnonzero(self._holders == 0)[:count].tolist()
            self._holders[pages] = 1
            return pages

    def hold(self, runs: Runs) -> None:
        """One more sequence holds these runs of pages."""
        with self.lock:
            for start, stop in runs:
                self._holders[start:stop] += 1

    def release(self, runs: Runs) -> None:
        """A sequence holds these runs of pages no more; see `shrink`."""
        with self.lock:
            for start, stop in runs:
                self._holders[start:stop] -= 1
            if self.poisons:
                self._poison(
                    [p for run in runs for p in range(*run) if not self._holders[p]]
                )

    def shrink(self) -> None:
        """Give the end back if much of it is free.

        For those who write to the pool: arrays that are made here belong to the thread.
        """
        self._collect()
        with self.lock:
            used = _behind_last(self._holders)
            if self.capacity >= _SHRINKS_FROM and used <= self.capacity // 2:
                self._resize(used)

    def leave(self, runs: Runs) -> None:
        """As `release`, at the next opportunity; safe at any moment."""
        self._left_behind.append(runs)

    def _collect(self) -> None:
        with self.lock:
            while self._left_behind:
                self.release(self._left_behind.popleft())

    def write(
        self,
        group: str,
        pages: Sequence[int],
        rows: Mapping[str, mx.array],
        first: int,
        of_page: int,
    ) -> None:
        """Write rows of a sequence into its pages.

        Args:
            group: Whose arrays.
            pages: Where they go, in order.
            rows: Name to array (B, H, N, w).
            first: Rows of the first of these pages that stay as they are.
            of_page: Rows of a page, the same for all arrays of a group.
        """
        with self.lock:
            self._rows_of_page[group] = of_page
            for name, array in rows.items():
                buffer, at = self._buffer(group, name, array), 0
                for low, high in self._spans(group, pages, first, array.shape[2]):
                    buffer[:, :, low:high] = array[:, :, at : at + high - low]
                    at += high - low

    def rows(
        self,
        group: str,
        name: str,
        pages: Sequence[int],
        count: int,
        heads: slice = slice(None),
        first: int = 0,
    ) -> mx.array:
        """Rows (B, heads, count, w) of some pages; a view if they are one run.

        Args:
            group: Whose.
            name: Of the array.
            pages: In order.
            count: How many rows.
            heads: Which heads.
            first: Rows of the first page that come before them.
        """
        buffer = self.groups[group][name]
        parts = [
            buffer[:, heads, low:high]
            for low, high in self._spans(group, pages, first, count)
        ]
        if not parts:
            return buffer[:, heads, :0]
        return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]

    def _spans(
        self, group: str, pages: Sequence[int], first: int, count: int
    ) -> Iterator[tuple[int, int]]:
        """(first, behind the last) of ``count`` rows in the buffers, run by run."""
        of_page = self._rows_of_page[group]
        for start, stop in runs_of(pages):
            low = start * of_page + first
            high = min(stop * of_page, low + count)
            if high > low:
                yield low, high
            count, first = count - (high - low), 0

    def copy(self, source: int, target: int) -> None:
        """Write one page into another."""
        for group, arrays in self.groups.items():
            n = self._rows_of_page[group]
            for buffer in arrays.values():
                old = buffer[:, :, source * n : (source + 1) * n]
                buffer[:, :, target * n : (target + 1) * n] = old

    def copy_from(
        self, other: PagePool, source: Sequence[int], target: Sequence[int]
    ) -> None:
        """Write another pool's pages, of the same codecs and shape, into own ones."""
        for group, arrays in other.groups.items():
            n = other._rows_of_page[group]
            rows = {
                name: other.rows(group, name, source, n * len(source))
                for name in arrays
            }
            self.write(group, target, rows, 0, n)

    def _buffer(self, group: str, name: str, like: mx.array) -> mx.array:
        arrays = self.groups.setdefault(group, {})
        if name not in arrays:
            batch, heads, _, width = like.shape
            rows = self.capacity * self._rows_of_page[group]
            # Zeros: what lies behind the last token must not be NaN.
            arrays[name] = mx.zeros((batch, heads, rows, width), like.dtype)
        return arrays[name]

    def _resize(self, pages: int) -> None:
        """Room for so many pages and some more, in new buffers; others are free."""
        capacity = capacity_of(pages, max(1, GROWTH // self.page)) if pages else 0
        for group, arrays in self.groups.items():
            rows = capacity * self._rows_of_page[group]
            for name, buffer in arrays.items():
                old = buffer.shape[2]
                arrays[name] = (
                    mx.pad(buffer, [(0, 0), (0, 0), (0, rows - old), (0, 0)])
                    if rows >= old
                    else mx.contiguous(buffer[:, :, :rows])
                )
        holders, kept = np.zeros(capacity, np.int32), self._holders[:capacity]
        holders[: len(kept)] = kept
        self._holders = holders

    def _poison(self, pages: Sequence[int]) -> None:
        for group, arrays in self.groups.items():
            for buffer in arrays.values():
                floats = mx.issubdtype(buffer.dtype, mx.floating)
                bad = mx.nan if floats else mx.iinfo(buffer.dtype).max
                n = self._rows_of_page[group]
                for low, high in self._spans(group, pages, 0, n * len(pages)):
                    buffer[:, :, low:high] = mx.array(bad, buffer.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> PagePool:
        """Itself: sequences are copied, what they share is not."""
        return self


def runs_of(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of each run of consecutive numbers.

    >>> list(runs_of([4, 5, 6, 2, 3]))
    [(4, 7), (2, 4)]
    """
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield pages[start], pages[i - 1] + 1
            start = i


def _run_of(free: Sequence[int], count: int, behind: int | None) -> list[int] | None:
    """``count`` consecutive free pages: behind a page, else anywhere; None if none."""
    fitting = [first for first, stop in runs_of(free) if stop - first >= count]
    if behind is not None and behind + 1 in free:
        if behind + 1 not in fitting:
            return None  # the end of the pool: it will grow there
        fitting = [behind + 1]
    return list(range(fitting[0], fitting[0] + count)) if fitting else None


def _behind_last(holders: npt.NDArray[np.int32]) -> int:
    """Pages up to the last that is held."""
    held = np.flatnonzero(holders)
    return int(held[-1]) + 1 if held.size else 0

"""`PageTable`: which pages of a pool are one sequence's, in the order of its text.

A page that other sequences hold, too, is copied before it is written to. Pages hold
codes of both sides, equally many, and means of keys, which are there before codes are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .codecs.base import Side
from .errors import UnsupportedError
from .packed_codes import PackedCodes
from .pages import PagePool, Runs, runs_of
from .tiles import TileLayout
from .tokens import TILE, TokenArrays

#: Pages that have moved: where they were, and where in another pool they are.
Moved = dict[tuple[PagePool, int], int]
#: Seconds to wait for another thread's computations.
_PATIENCE = 10


class PageTable:
    """One sequence's pages.

    Args:
        pool: Where they are.

    Attributes:
        pool: As given.
        pages: Their numbers, in the order of the text.
        length: Tokens that are codes; pages but the last are full.
        means: Pages that have a mean.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.length = self.means = 0
        self._layouts: dict[Side, TileLayout | None] = {}
        self._runs: Runs | None = None

    def extend(self, sides: Mapping[Side, TokenArrays]) -> None:
        """Write codes of every side behind the present ones.

        Args:
            sides: Equally many of each, by ``"keys"`` and ``"values"``.

        Raises:
            ValueError: if they are in another order, or the last tile is not whole.
        """
        page, stop = self.pool.page, self.length
        first_page = self.length // page
        for side, codes in sides.items():
            layout = codes.layout
            per_row = 1 if layout is None else TILE
            other = self.length and layout != self._layouts[side]
            if other or self.length % per_row:
                raise ValueError(
                    f"{codes!r} cannot follow {self!r}: codes of one order follow "
                    "whole tiles"
                )
            stop = self.length + codes.length
            self._reserve(first_page, -(-stop // page))
            rows = -(-codes.length // per_row)
            self.pool.write(
                side,
                self.pages[first_page:],
                {name: array[:, :, :rows] for name, array in codes.arrays.items()},
                self.length % page // per_row,
                page // per_row,
            )
            self._layouts[side] = layout
        self.length = stop

    def append_means(self, rows: mx.array) -> None:
        """Write means (B, H, pages, D) of the pages that follow."""
        first, stop = self.means, self.means + rows.shape[2]
        self._reserve(first, stop)
        self.pool.write("means", self.pages[first:stop], {"keys": rows}, 0, 1)
        self.means = stop

    def _reserve(self, first: int, stop: int) -> None:
        """Have pages up to ``stop``; nobody else holds those from ``first`` on."""
        pages, pool = self.pages, self.pool
        if pool.is_sparse:
            self._move_down()
        for i, holders in enumerate(pool.holders(pages[first:stop]).tolist(), first):
            if holders > 1:
                (own,) = pool.take(1)
                pool.copy(pages[i], own)
                pool.release(((pages[i], pages[i] + 1),))
                pages[i] = own
                self._runs = None
        if stop > len(pages):
            pages += pool.take(stop - len(pages), pages[-1] if pages else None)
            self._runs = None

    def _move_down(self) -> None:
        """Move what nobody shares to the front of the pool, so that its end is free."""
        pool, holders = self.pool, self.pool.holders(self.pages).tolist()
        front = pool.held
        high = [i for i, page in enumerate(self.pages) if page >= front]
        some = [i for i in high if holders[i] == 1]
        old = [self.pages[i] for i in some]
        new = pool.lowest(len(some))
        pool.copy_from(pool, old, new)
        for i, page in zip(some, new, strict=True):
            self.pages[i] = page
        self._runs = None
        pool.release(tuple(runs_of(old)))
        pool.shrink()

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens, and pages that have no other."""
        self.length -= count
        self.keep_means(self.length)

    def keep_means(self, tokens: int) -> None:
        """Forget means of pages that begin behind the first ``tokens`` tokens."""
        page = self.pool.page
        self.means = min(self.means, -(-tokens // page))
        needed = max(self.means, -(-self.length // page))
        if not self.length:
            self._layouts.clear()
        self._forget(slice(needed, None))

    def drop(self, places: Collection[int]) -> None:
        """Forget whole pages of tokens; what is left moves together, if it is alone.

        Args:
            places: Where they stand among its pages.
        """
        gone, pages = set(places), self.pages
        released = [pages[place] for place in sorted(gone)]
        self.length = max(0, self.length - len(gone) * self.pool.page)
        self.means = max(0, self.means - len(gone))
        self.pages = [page for i, page in enumerate(pages) if i not in gone]
        self._runs = None
        self.pool.release(tuple(runs_of(released)))
        self.pool.shrink()
        if self.is_alone:
            self.move_to(PagePool(self.pool.page))

    def move_to(self, pool: PagePool, moved: Moved | None = None) -> None:
        """Hold the same in another pool of the same codecs and shape.

        Args:
            pool: The other pool.
            moved: Where pages of sequences that moved before are now: those that they
                share stay shared. More are added.
        """
        if pool is self.pool:
            return
        moved = {} if moved is None else moved
        old, pages, runs = self.pool, self.pages, self.runs
        new = [page for page in pages if (old, page) not in moved]
        known = [moved[old, page] for page in pages if (old, page) in moved]
        places = pool.take(len(new))
        pool.copy_from(old, new, places)
        pool.hold(tuple(runs_of(known)))
        moved.update(zip(((old, page) for page in new), places, strict=True))
        self.pool, self.pages = pool, [moved[old, page] for page in pages]
        self._runs = None
        old.release(runs)

    def enter_thread(self) -> bool:
        """Be in a pool of this thread; whether it had to move there.

        What another thread's pool gets later could not be computed here. So pages that
        others share are copied, once that thread has computed what it wrote.

        Raises:
            UnsupportedError: if it does not within seconds.
        """
        old = self.pool
        if old.thread == threading.get_ident():
            return False
        if self.is_alone:
            old.thread = threading.get_ident()
            return False
        pages, runs, deadline = self.pages, self.runs, time.monotonic() + _PATIENCE
        while True:
            new = PagePool(old.page)
            places = new.take(len(pages))
            try:
                with old.lock:
                    new.copy_from(old, pages, places)
                    mx.eval(new.groups)
                break
            except RuntimeError as error:  # it is computed on the other thread
                if time.monotonic() > deadline:
                    raise UnsupportedError(
                        "another thread goes on with a conversation that this one is "
                        f"a fork of, and did not compute its step in {_PATIENCE} s",
                        "evaluate its steps there, or fork and step on one thread",
                    ) from error
            time.sleep(0.001)
        self.pool, self.pages, self._runs = new, places, None
        old.release(runs)
        return True

    def rewrite(self, sides: Mapping[Side, TokenArrays]) -> None:
        """Hold these codes in place of its own, in a pool of its own."""
        old, runs, count = self.pool, self.runs, self.means
        means = self.mean_rows(0, count) if count else None
        self.pool, self.pages, self._runs = PagePool(old.page), [], None
        self.length = self.means = 0
        if means is not None:
            self.append_means(means)
        self.extend(sides)
        # Attention of the step at hand may still read them.
        old.leave(runs)

    def _forget(self, some: slice) -> None:
        gone = self.pages[some]
        if gone:
            del self.pages[some]
            self._runs = None
            self.pool.release(tuple(runs_of(gone)))
            self.pool.shrink()

    @property
    def runs(self) -> Runs:
        """Its pages as runs of consecutive ones."""
        if self._runs is None:
            self._runs = tuple(runs_of(self.pages))
        return self._runs

    @property
    def is_alone(self) -> bool:
        """Whether nobody else has pages in its pool."""
        return self.pool.held == len(self.pages) and not self.shared_pages

    @property
    def shared_pages(self) -> int:
        """How many of its pages others hold, too."""
        return int(np.count_nonzero(self.pool.holders(self.pages) > 1))

    @property
    def nbytes(self) -> int:
        """Bytes of its pages, and of the pool's free ones if it is alone there.

        Of several in a pool nobody counts free ones; `held_nbytes` of all does.
        """
        pool = self.pool
        return pool.nbytes if self.is_alone else len(self.pages) * pool.page_nbytes

    @property
    def shared_nbytes(self) -> int:
        """Bytes of its pages that others hold, too; they are part of `nbytes`."""
        return self.shared_pages * self.pool.page_nbytes

    def codes(self, side: Side) -> PackedCodes:
        """One side's codes as they are now."""
        layout = self._layouts.get(side)
        return PackedCodes(self.pool, self.pages, self.length, side, layout)

    def mean_rows(self, first: int, stop: int, heads: slice = slice(None)) -> mx.array:
        """Means (B, heads, pages, D) of some pages."""
        pages = self.pages[first:stop]
        return self.pool.rows("means", "keys", pages, len(pages), heads)

    def fork(self) -> PageTable:
        """Another sequence with the same pages; without any, in a pool of its own.

        What it will store then may have other codecs.
        """
        other = PageTable(self.pool if self.pages else PagePool(self.pool.page))
        other.pages, other.length, other.means = (
            list(self.pages),
            self.length,
            self.means,
        )
        other._layouts, other._runs = dict(self._layouts), self.runs
        self.pool.hold(self.runs)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PageTable:
        copied = memo[id(self)] = self.fork()
        return copied

    def __del__(self) -> None:
        self.pool.leave(self.runs)

    def __repr__(self) -> str:
        return f"PageTable({self.length} tokens in {len(self.pages)} pages)"


def held_nbytes(tables: Iterable[PageTable]) -> int:
    """Bytes of pages of several sequences, and of what is free in their pools.

    A page counts once, also if others hold it as well.
    """
    return sum(
        (count + pool.capacity - pool.held) * pool.page_nbytes
        for pool, count in _distinct(tables).items()
    )


def pages_nbytes(tables: Iterable[PageTable]) -> int:
    """The same without what is free."""
    return sum(c * pool.page_nbytes for pool, c in _distinct(tables).items())


def _distinct(tables: Iterable[PageTable]) -> dict[PagePool, int]:
    """How many pages of each pool they hold, each counted once."""
    held: dict[PagePool, npt.NDArray[np.bool_]] = {}
    for table in tables:
        pool = table.pool
        pages = held.setdefault(pool, np.zeros(pool.capacity, np.bool_))
        for start, stop in table.runs:
            pages[start:stop] = True
    return {pool: int(np.count_nonzero(pages)) for pool, pages in held.items()}

"""`PageTable`: which pages of a pool are one sequence's, in the order of its text.

A page that other sequences hold, too, is copied before it is written to. Pages hold
codes of both sides, equally many, and means of keys, which are there before codes are.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from .codecs.base import Side
from .pages import PagePool, Runs, runs_of
from .tiles import TileLayout
from .tokens import TILE, Places, TokenArrays

#: Pages that have moved: where they were, and where in another pool they are.
Moved = dict[tuple[PagePool, int], int]


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

    def drop_first(self, count: int) -> None:
        """Forget the first ``count`` tokens, whole pages.

        What is left moves together, if nobody shares it.
        """
        gone = count // self.pool.page
        self.length = max(0, self.length - count)
        self.means = max(0, self.means - gone)
        self._forget(slice(0, gone))
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
        """Bytes of its pages, and of the pool's free ones if it is alone there."""
        pool = self.pool
        return pool.nbytes if self.is_alone else len(self.pages) * pool.page_nbytes

    @property
    def shared_nbytes(self) -> int:
        """Bytes of its pages that others hold, too; they are part of `nbytes`."""
        return self.shared_pages * self.pool.page_nbytes

    def codes(self, side: Side) -> PackedCodes:
        """One side's codes as they are now."""
        return PackedCodes(self, side, self._layouts.get(side))

    def mean_rows(self, first: int, stop: int, heads: slice = slice(None)) -> mx.array:
        """Means (B, heads, pages, D) of some pages."""
        pages = self.pages[first:stop]
        return self.pool.rows("means", "keys", pages, len(pages), heads)

    def fork(self) -> PageTable:
        """Another sequence with the same pages."""
        other = PageTable(self.pool)
        other.pages, other.length, other.means = (
            list(self.pages),
            self.length,
            self.means,
        )
        other._layouts, other._runs = dict(self._layouts), self.runs
        self.pool.hold(self.runs)
        return other

    def __del__(self) -> None:
        self.pool.leave(self.runs)

    def __repr__(self) -> str:
        return f"PageTable({self.length} tokens in {len(self.pages)} pages)"


class PackedCodes:
    """One side's codes of a sequence, with the length they had when it was asked for.

    It reads as `TokenArrays` do, and is valid until its sequence is written to.

    Args:
        table: The sequence's pages.
        side: ``"keys"`` or ``"values"``.
        layout: Of codes in tile order, or None.
    """

    __slots__ = ("_pages", "_pool", "_side", "_tiles", "layout", "length")

    def __init__(self, table: PageTable, side: Side, layout: TileLayout | None) -> None:
        self._pool, self._pages = table.pool, tuple(table.pages)
        self._side, self.layout, self.length = side, layout, table.length
        self._tiles: Places | None = None

    @property
    def arrays(self) -> dict[str, mx.array]:
        """Whole buffers (B, H, capacity, .) of the pool; `tiles` are rows of them."""
        return self._pool.groups.get(self._side, {})

    @property
    def tiles(self) -> Places:
        """Row of the buffers that each tile of the text is in, in tile order."""
        if self._tiles is None:
            of_page, count = self._pool.page // TILE, -(-self.length // TILE)
            pages = np.array(self._pages, np.int32)
            places: Places = (
                np.arange(of_page, dtype=np.int32) + of_page * pages[:, None]
            )
            self._tiles = places.reshape(-1)[:count]
        return self._tiles

    def view(self, name: str, heads: slice = slice(None)) -> mx.array:
        """The rows in use of one array: (B, heads, tokens or tiles, .)."""
        rows = self.length if self.layout is None else -(-self.length // TILE)
        return self._pool.rows(self._side, name, self._pages, rows, heads)

    def views(self) -> dict[str, mx.array]:
        """`view` of every array; nothing if there are no codes."""
        return {name: self.view(name) for name in self.arrays if self.length}

    def __repr__(self) -> str:
        return f"PackedCodes({self._side}, {self.length} tokens)"

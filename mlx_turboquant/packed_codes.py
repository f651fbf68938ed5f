"""`PackedCodes`: one side's codes of a sequence, read where its pages lie.

Owns no page: which there are is `page_table`'s, room for them `pages`'.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .codecs.base import Side
from .pages import PagePool
from .tiles import TileLayout
from .tokens import TILE, Places


class PackedCodes:
    """One side's codes of a sequence, with the length they had when it was asked for.

    It reads as `TokenArrays` do, and is valid until its sequence is written to.

    Args:
        pool: Where its pages are.
        pages: Their numbers, in the order of the text.
        length: Tokens that are codes.
        side: ``"keys"`` or ``"values"``.
        layout: Of codes in tile order, or None.
    """

    __slots__ = ("_pages", "_pool", "_side", "_tiles", "layout", "length")

    def __init__(
        self,
        pool: PagePool,
        pages: Sequence[int],
        length: int,
        side: Side,
        layout: TileLayout | None,
    ) -> None:
        self._pool, self._pages, self.length = pool, tuple(pages), length
        self._side, self.layout = side, layout
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

"""`StoredTokens`: sink, packed and recent tokens of one layer, and moves between them.

    sink     the first tokens, as the model gave them; set when the first page is packed
    packed   codes of keys and of values, always equally many
    recent   the latest tokens, as the model gave them

When tokens move is `schedule`'s, what codes are made with `quantizers`'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..codecs.base import Side
from ..page_table import Moved, PageTable
from ..pages import PagePool
from ..quantizer import Quantizer, Sides
from ..segments import CompressedTokens, PreparedSteps, QueryObserver
from ..tiles import TileLayout
from ..tokens import TILE, TokenArrays
from . import state as saved
from .shallow import shallow

Arrays = dict[str, mx.array]
#: Recent tokens that there is room for at first.
_SHORT = 32


class StoredTokens:
    """One layer's tokens.

    Args:
        recent_growth: Tokens that the buffer of recent tokens grows by.
        page: Tokens of a page of codes.

    Attributes:
        sink: ``keys`` and ``values`` (B, H, S, .), or empty.
        table: The pages of codes.
        packed: Codes by side. A new object whenever codes change, so that handles keep
            the length they have.
        recent: ``keys`` and ``values`` (B, H, capacity, .).
    """

    def __init__(self, recent_growth: int, page: int) -> None:
        self.sink: Arrays = {}
        self.table = PageTable(PagePool(page))
        self.recent = TokenArrays(growth=recent_growth, first=_SHORT)
        self._codes_changed()

    def move_to(self, pool: PagePool, moved: Moved) -> None:
        """As `PageTable.move_to`."""
        self.table.move_to(pool, moved)
        self._codes_changed()

    def enter_thread(self) -> bool:
        """As `PageTable.enter_thread`."""
        moved = self.table.enter_thread()
        if moved:
            self._codes_changed()
        return moved

    def _codes_changed(self) -> None:
        table = self.table
        self.packed = Sides(table.codes("keys"), table.codes("values"))

    def fork(self) -> StoredTokens:
        """The same pages until one of the two writes to them, and the same sink."""
        other = shallow(self)
        other.table, other.recent = self.table.fork(), self.recent.fork()
        other._codes_changed()
        return other

    @property
    def sink_length(self) -> int:
        """Tokens in the sink."""
        return self.sink["keys"].shape[2] if self.sink else 0

    @property
    def packed_length(self) -> int:
        """Tokens stored as codes."""
        return self.packed.keys.length

    @property
    def cut_length(self) -> int:
        """Codes in a tile that is not whole, in tile order; else 0."""
        return self.packed_length % TILE if self.packed.keys.layout else 0

    @property
    def length(self) -> int:
        """Tokens of all three segments."""
        return self.sink_length + self.packed_length + self.recent.length

    def handles(
        self,
        quantizers: Sides[Quantizer],
        hidden: tuple[int, int],
        backend: Any,
        prepared: PreparedSteps,
        observer: QueryObserver | None,
    ) -> tuple[CompressedTokens, CompressedTokens]:
        """Keys and values as attention should see them; see `CompressedTokens`."""
        recent, length, sink, packed = (
            self.recent.arrays,
            self.recent.length,
            self.sink,
            self.packed,
        )
        return (
            CompressedTokens(
                quantizers.keys,
                sink.get("keys"),
                packed.keys if backend else None,
                recent["keys"],
                length,
                hidden,
                backend,
                prepared,
                observer,
            ),
            CompressedTokens(
                quantizers.values,
                sink.get("values"),
                packed.values if backend else None,
                recent["values"],
                length,
                hidden,
                backend,
                prepared,
            ),
        )

    def pack(self, codes: Sequence[Sides[TokenArrays]], sink: int, room: int) -> None:
        """Put codes in the place of the oldest recent tokens.

        Args:
            codes: Of the tokens behind the first ``sink`` recent ones, in order.
            sink: Recent tokens that become the sink: all of it, or 0 if there is one.
            room: Recent tokens that there will be before more are packed.
        """
        if sink:
            # Contiguous, or the sink would keep the prompt's buffer alive.
            self.sink = {
                name: mx.contiguous(tokens[:, :, :sink])
                for name, tokens in self.recent.views().items()
            }
        for part in codes:
            self.table.extend(dict(part.items()))
        self._codes_changed()
        self.recent.drop_first(sink + sum(part.keys.length for part in codes), room)

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens, of as many as there are at least."""
        from_recent = min(count, self.recent.length)
        from_packed = min(count - from_recent, self.packed_length)
        from_sink = count - from_recent - from_packed
        self.recent.drop_last(from_recent)
        if not from_packed:
            return
        self.table.drop_last(from_packed)
        self._codes_changed()
        if not self.packed_length:
            # What is left of the sink is recent again, for the next page to follow it.
            self._sink_to_recent(self.sink_length - from_sink)

    def drop_last_codes(self, count: int, decoded: Arrays) -> None:
        """Put ``decoded`` in the place of the last ``count`` codes.

        Args:
            count: Codes to forget.
            decoded: ``keys`` and ``values`` that they stand for; from now on they are
                the first recent tokens.
        """
        self.table.drop_last(count)
        self._codes_changed()
        self._put_before_recent(decoded)
        if not self.packed_length:
            self._sink_to_recent(self.sink_length)

    def _sink_to_recent(self, keep: int) -> None:
        """Let the sink's first ``keep`` tokens be recent ones again."""
        kept = {name: tokens[:, :, :keep] for name, tokens in self.sink.items()}
        self.sink = {}
        self._put_before_recent(kept)

    def _put_before_recent(self, tokens: Arrays) -> None:
        """Tokens, if any, in front of the recent ones, in new buffers."""
        recent = self.recent.views()
        if tokens:
            recent = {
                name: mx.concatenate([tokens[name].astype(array.dtype), array], axis=2)
                for name, array in recent.items()
            }
        self.recent.replace(recent)

    def arrange(self, arranged: Callable[[Side, TokenArrays], TokenArrays]) -> None:
        """Bring codes into the order that ``arranged`` returns them in."""
        if self.packed_length:
            sides: dict[Side, TokenArrays] = {}
            for side, held in self.packed.items():
                codes = TokenArrays(held.views(), held.length, layout=held.layout)
                sides[side] = arranged(side, codes)
            self.table.rewrite(sides)
            self._codes_changed()

    def drop_pages(self, places: Collection[int]) -> None:
        """Forget whole pages of codes, by where they stand among all."""
        self.table.drop(places)
        self._codes_changed()

    def cut_sink(self, keep: int) -> None:
        """Forget all of the sink but its first ``keep`` tokens."""
        kept = {name: tokens[:, :, :keep] for name, tokens in self.sink.items()}
        self.sink = {
            name: mx.contiguous(tokens) for name, tokens in kept.items() if keep
        }

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer, capacity included."""
        sink = sum(array.nbytes for array in self.sink.values())
        return self.table.nbytes + self.recent.nbytes + sink

    @property
    def arrays(self) -> list[mx.array]:
        """The buffers of pages and of recent tokens."""
        groups = (*self.table.pool.groups.values(), self.recent.arrays)
        return [array for arrays in groups for array in arrays.values()]

    @property
    def state(self) -> dict[str, Arrays]:
        """Groups of arrays to save: the tokens in use."""
        return {
            "sink": self.sink,
            "packed": saved.join_sides(self.packed),
            "recent": self.recent.views(),
        }

    def load(
        self,
        groups: Mapping[str, Arrays],
        layouts: Sides[TileLayout | None] | None,
        arranged: Callable[[Side, TokenArrays], TokenArrays],
    ) -> None:
        """Take over what `state` gave.

        Args:
            groups: The arrays; means are in their pages already.
            layouts: Of codes in tile order; None if they are in vector order.
            arranged: Brings a side's codes into the order to keep them in.
        """
        layouts = layouts or Sides(None, None)
        self.sink = groups["sink"]
        if groups["packed"]:
            arrays = saved.split_sides(groups["packed"])
            codes = {
                side: arranged(side, TokenArrays(arrays_of_side, layout=layout))
                for (side, arrays_of_side), layout in zip(
                    arrays.items(), layouts, strict=True
                )
            }
            self.table.extend(codes)
            self._codes_changed()
        self.recent.replace(groups["recent"], room=_SHORT)

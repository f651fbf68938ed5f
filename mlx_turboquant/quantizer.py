"""`Quantizer`: how the vectors of one side of one layer become codes, and back.

    encode   channel transform -> minus the page's mean -> codec
    decode   codec -> plus the page's mean -> inverse channel transform

Caches, handles and backends take one for the keys and one for the values. Kernels do
the same faster; what they must agree with is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import mlx.core as mx

from .codecs import Codec, codec_for
from .codecs.base import Side
from .page_table import PageTable
from .pages import PagePool
from .spec import CodecSpec
from .tiles import TileLayout, in_vectors, tile_layout
from .tokens import Codes, TokenArrays
from .transform import ChannelTransform

T = TypeVar("T")


class Sides(NamedTuple, Generic[T]):
    """Something of the keys and of the values of one layer."""

    keys: T
    values: T

    def items(self) -> Iterator[tuple[Side, T]]:
        """(side, what there is of it), keys first."""
        yield "keys", self.keys
        yield "values", self.values


class PageMeans:
    """Means of pages of keys, in the codes' basis, taken off before encoding.

    Args:
        page: Tokens to a mean.
        table: The pages that hold them, beside codes; pages of their own if None.
        sample: Tokens at a page's beginning that the means of new pages are of; all
            if None.

    Attributes:
        table, sample: As given.
    """

    def __init__(
        self, page: int, table: PageTable | None = None, sample: int | None = None
    ) -> None:
        self.table = PageTable(PagePool(page)) if table is None else table
        self.sample = page if sample is None else min(sample, page)

    @property
    def page(self) -> int:
        """Tokens to a mean."""
        return self.table.pool.page

    @property
    def rows(self) -> mx.array | None:
        """The pool's buffer (B, H, capacity, D) float16; None before the first page."""
        return self.table.pool.groups.get("means", {}).get("keys")

    @property
    def count(self) -> int:
        """Pages that have one."""
        return self.table.means

    def append(self, means_rot: mx.array) -> None:
        """Add means (B, H, pages, D) of the pages that follow."""
        self.table.append_means(means_rot.astype(mx.float16))

    def of_pages(self, first: int, stop: int, heads: slice = slice(None)) -> mx.array:
        """Means (B, heads, stop - first, D) float16 of some pages of the text."""
        return self.table.mean_rows(first, stop, heads)

    def of_tokens(self, first: int, count: int, heads: slice = slice(None)) -> mx.array:
        """Each token's mean (B, heads, count, D) float32, from token ``first`` on."""
        low, high = first // self.page, -(-(first + count) // self.page)
        rows = self.of_pages(low, high, heads).astype(mx.float32)
        start = first - low * self.page
        return mx.repeat(rows, self.page, axis=2)[:, :, start : start + count]

    def keep(self, tokens: int) -> None:
        """Forget the pages that begin behind the first ``tokens`` tokens."""
        self.table.keep_means(tokens)

    @property
    def state(self) -> dict[str, mx.array]:
        """The means in use, as arrays to save."""
        return {"keys": self.of_pages(0, self.count)} if self.count else {}

    @state.setter
    def state(self, arrays: dict[str, mx.array]) -> None:
        self.table.keep_means(0)
        if arrays:
            self.table.append_means(arrays["keys"])


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Encode and decode vectors of one side of one layer.

    Attributes:
        codec: What turns vectors in the codes' basis into codes.
        transform: Into that basis.
        side: What the vectors are.
        means: Means of the pages encoded so far; None to take none off. The only part
            that grows.

    >>> quantizer = Quantizer.of(CodecSpec("turboquant", 3), 128)
    >>> quantizer.decode(quantizer.encode(mx.ones((1, 1, 4, 128)))).shape
    (1, 1, 4, 128)
    """

    codec: Codec
    transform: ChannelTransform
    side: Side
    means: PageMeans | None = None

    @classmethod
    def of(
        cls, spec: CodecSpec, dim: int, side: Side = "keys", seed: int = 0
    ) -> Quantizer:
        """A quantizer that no text has calibrated: no gains, no means.

        Args:
            spec: The codec and its bits.
            dim: Elements of a vector.
            side: What the vectors are; codecs choose scales by it.
            seed: Seed of the rotation.

        Raises:
            UnsupportedError: if the codec or its rotation cannot do ``dim``.
        """
        codec = codec_for(spec, dim, side, seed)
        return cls(codec, ChannelTransform(codec.rotation), side)

    @property
    def layout(self) -> TileLayout:
        """Where codes lie in tile order.

        Raises:
            ValueError: if kernels cannot read the codec's codes.
        """
        return tile_layout(self.codec, self.side)

    def pages_begun(self, x: mx.array, first: int) -> mx.array | None:
        """What the means of pages that begin in x are of: (B, H, pages * sample, D).

        A page that was cut by a trim keeps the mean it had.

        Args:
            x: Vectors (B, H, N, D); of a page that begins in them, they hold what its
                mean is of: all of it, or its first `PageMeans.sample`.
            first: Encoded vectors before them.

        Returns:
            Those vectors; None if no page begins.

        Raises:
            ValueError: if they end too early.
        """
        if self.means is None:
            return None
        page, sample = self.means.page, self.means.sample
        start = max(0, self.means.count * page - first)
        count = max(0, x.shape[2] - start)
        if 0 < count % page < sample:
            raise ValueError(
                f"{x.shape[2]} tokens behind {first} end within the first {sample} of "
                f"a page of {page}, which its mean is of; encode {sample} at least"
            )
        if sample == page:
            return x[:, :, start:] if count else None
        begun = [x[:, :, at : at + sample] for at in range(start, start + count, page)]
        return mx.concatenate(begun, axis=2) if begun else None

    def add_means(self, x: mx.array, first: int) -> None:
        """Add the means of the pages that begin within x; see `pages_begun`."""
        begun = self.pages_begun(x, first)
        if begun is not None and self.means is not None:
            batch, heads, _, dim = begun.shape
            shape = batch, heads, -1, self.means.sample, dim
            pages = begun.astype(mx.float32).reshape(shape)
            self.means.append(self.transform.encode(mx.mean(pages, axis=3)))

    def encode(self, x: mx.array, first: int = 0) -> TokenArrays:
        """Codes of vectors x (B, H, N, D), any float dtype.

        With means, x must end where a page does, or behind what its mean is of.

        Args:
            x: The vectors, in the model's basis.
            first: Encoded vectors before them.
        """
        return self.codec.encode(self.encode_rot(x, first))

    def encode_rot(self, x: mx.array, first: int = 0) -> mx.array:
        """What `encode` hands to the codec: x rotated, less the means it adds."""
        self.add_means(x, first)
        x_rot = self.transform.encode(x)
        if self.means is not None:
            x_rot = x_rot - self.means.of_tokens(first, x.shape[2])
        return x_rot

    def decode_rot(
        self,
        codes: Codes,
        dtype: mx.Dtype = mx.float32,
        heads: slice = slice(None),
        first: int = 0,
    ) -> mx.array:
        """Vectors (B, heads, N, D) in the codes' basis, means put back.

        Args:
            codes: What `encode` returned, in any order.
            dtype: Of the result; the arithmetic is float32.
            heads: Which KV heads.
            first: Encoded vectors before them.
        """
        centered_rot = self.codec.decode(in_vectors(codes, heads), dtype)
        if self.means is None:
            return centered_rot
        means = self.means.of_tokens(first, codes.length, heads)
        return (centered_rot.astype(mx.float32) + means).astype(dtype)

    def decode(
        self, codes: Codes, heads: slice = slice(None), first: int = 0
    ) -> mx.array:
        """Vectors (B, heads, N, D) float32 in the model's basis: undoes `encode`."""
        return self.transform.of_heads(heads).decode(
            self.decode_rot(codes, mx.float32, heads, first=first)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of gains and channel order; means are in pages, which are counted."""
        arrays = (self.transform.gains, self.transform.channel_order)
        return sum(array.nbytes for array in arrays if array is not None)

    def with_pages(self, table: PageTable) -> Quantizer:
        """The same, with the means of another sequence's pages."""
        if self.means is None:
            return self
        return replace(self, means=PageMeans(self.means.page, table))

    def sampling(self, sample: int) -> Quantizer:
        """The same, taking the means of new pages from their first ``sample`` tokens.

        Pages that it encodes are its own, too.
        """
        means = self.means
        if means is None or sample == means.sample:
            return self
        return replace(self, means=PageMeans(means.page, means.table, sample))

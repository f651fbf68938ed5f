"""Tile order, in which GPU kernels read codes: the definition they are held to.

Owns a permutation of bits. Codecs write and read *vector order*, one token's words
behind the other's (`packing`, `bitstream`). In *tile order* 32 tokens of a head are a
tile that 32 slots share, so that a lane of a simdgroup finds together what it decodes.
A slot, 4 * major + minor (major 0..7, minor 0..3), has P / 8 columns c of 4 rows j,
where P is the padded number of elements, and at each a *couple*, a low and a high code:

             tokens of the tile                     elements
    keys     8j + major                             minor * P / 4 + 2c, then + 1
    values   8j + 2 * minor, then + 1               major * P / 8 + c

Four columns are a *unit*; if P is an odd number of sixteens, a last unit has 2. A
slot's words are those of its units in order, in one of two ways.

Codes of elements. Low codes lie in low halves, high ones at the same bits of high
halves. Couple 4 * (c % 4) + j is number that of its unit. A unit of n couples of b bits
has ceil(n * b / 16) words of 16 // b couples each, low bits first, from bit 1 on if
there are spare bits, else from bit 0 on. Spare are bit 0 and then those above the
codes, in the order of the words; low bits first they are the remaining couples. The
halves of a unit of 3 bits:

    bit       15 - 13     12 - 10     9 - 7       6 - 4       3 - 1       0
    word 0    couple 4    couple 3    couple 2    couple 1    couple 0    s0
    word 1    couple 9    couple 8    couple 7    couple 6    couple 5    s1
    word 2    couple 14   couple 13   couple 12   couple 11   couple 10   s2

where s0, s1, s2, low bits first, are couple 15.

Codes of pairs, elements 2i and 2i + 1 of a token, with an angle's norm above it: a
stream of bits (`bitstream`). One token's codes lie together in a unit, so that what is
looked up by bits of the pairs behind it, too, finds them there. Of a unit of n columns,
the pair of a key at column c is number n * j + c % 4; the pair of a value at columns
2k and 2k + 1 is number n / 2 * (2j + h) + k % 2, where h is 1 for the high token.

Scale k of token 8j + major is number 32k + 4 * major + j of its tile. Tokens behind the
last have codes and scales of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .bitstream import BitStream
from .codecs import Codec
from .codecs.base import Side
from .codecs.kernel_format import ANGLES, POLYNOMIAL, TRELLIS
from .packing import pack, words_per_vector
from .tokens import TILE, Codes, TokenArrays

_ROWS, _MAJORS = 4, 8
_WORD, _HALF = 32, 16
_TILES_AT_ONCE = 64

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TileLayout:
    """Where the codes of one side of a cache lie, in either order.

    Args:
        kind: As `KernelFormat.kind`.
        bits: As `KernelFormat.bits`.
        terms: As `KernelFormat.terms`.
        dim: Elements of a vector.
        side: ``"keys"`` or ``"values"``.
    """

    kind: int
    bits: int
    terms: int
    dim: int
    side: Side

    @property
    def padded_dim(self) -> int:
        """Elements of a vector with its padding, a multiple of 16."""
        fill = 16
        if self.kind == TRELLIS:
            # Its circle closes only if its bits fill words.
            fill = 32 if self.bits % 2 == 0 else 64
        return -(-self.dim // fill) * fill

    @property
    def code_bits(self) -> int:
        """Bits of an element's code (POLYNOMIAL), or of a pair's with its norm."""
        return self.bits + (self.terms if self.kind == ANGLES else 0)

    @property
    def scales(self) -> int:
        """fp16 scales of a token."""
        return 2 if self.kind == ANGLES else 1

    @property
    def vector_words(self) -> int:
        """uint32 words of a token in vector order."""
        if self.kind == POLYNOMIAL:
            return words_per_vector(self.bits, self.dim)
        return sum(stream.words for stream in _vector_streams(self))

    @property
    def lane_words(self) -> int:
        """uint32 words of a slot in tile order."""
        if self.kind != POLYNOMIAL:
            return -(-self.padded_dim // 2 * self.code_bits // _WORD)
        units, rest = divmod(self.padded_dim, 2 * _HALF)
        return units * self.bits + (-(-self.bits // 2) if rest else 0)

    @property
    def tile_words(self) -> int:
        """uint32 words of a tile; word w of slot s is number 32w + s."""
        return TILE * self.lane_words

    @property
    def tile_scales(self) -> int:
        """fp16 scales of a tile."""
        return TILE * self.scales

    def to_tiles(self, words: mx.array, scales: mx.array) -> tuple[mx.array, mx.array]:
        """Vector order to tile order.

        Args:
            words: uint32 (B, H, T, vector_words).
            scales: fp16 (B, H, T, scales).

        Returns:
            uint32 (B, H, ceil(T / 32), tile_words) and
            fp16 (B, H, ceil(T / 32), tile_scales).
        """
        batch, heads, tokens, _ = words.shape
        lead = (batch, heads, -(-tokens // TILE))
        pad = [(0, 0), (0, 0), (0, -tokens % TILE), (0, 0)]
        words = mx.pad(words, pad).reshape(*lead, TILE * self.vector_words)
        by_token = mx.pad(scales, pad).reshape(*lead, _ROWS, _MAJORS, self.scales)
        by_slot = by_token.transpose(0, 1, 2, 5, 4, 3)
        words = _moved(words, _orders(self).tile_sources)
        return words, by_slot.reshape(*lead, self.tile_scales)

    def to_vectors(
        self, words: mx.array, scales: mx.array, tokens: int
    ) -> tuple[mx.array, mx.array]:
        """The inverse of `to_tiles`: the first ``tokens`` tokens in vector order.

        Returns:
            uint32 (B, H, tokens, vector_words) and fp16 (B, H, tokens, scales).
        """
        batch, heads, tiles, _ = words.shape
        lead = (batch, heads, TILE * tiles)
        words = _moved(words, _orders(self).vector_sources)
        by_slot = scales.reshape(*lead[:2], tiles, self.scales, _MAJORS, _ROWS)
        by_token = by_slot.transpose(0, 1, 2, 5, 4, 3).reshape(*lead, self.scales)
        return words.reshape(*lead, -1)[:, :, :tokens], by_token[:, :, :tokens]


def tile_layout(codec: Codec, side: Side) -> TileLayout:
    """The layout of what a codec stores for one side.

    Raises:
        ValueError: if kernels cannot read its codes.
    """
    form = codec.kernel_format
    if form is None:
        raise ValueError(f"codec {codec.spec} has no kernel, so no tile order")
    return TileLayout(form.kind, form.bits, form.terms, codec.dim, side)


def in_tiles(codes: TokenArrays, layout: TileLayout) -> TokenArrays:
    """Codes in tile order, those of a ``layout``."""
    if codes.layout is not None:
        return codes
    words, scales = layout.to_tiles(codes.view("words"), codes.view("scales"))
    return TokenArrays({"words": words, "scales": scales}, codes.length, layout=layout)


def in_vectors(codes: Codes, heads: slice = slice(None)) -> TokenArrays:
    """Codes of some heads in vector order, whatever order they have."""
    if codes.layout is None:
        views = {name: codes.view(name, heads) for name in codes.arrays}
        return TokenArrays(views, codes.length)
    words, scales = codes.layout.to_vectors(
        codes.view("words", heads), codes.view("scales", heads), codes.length
    )
    return TokenArrays({"words": words, "scales": scales}, codes.length)


@dataclass(frozen=True, eq=False)
class _Orders:
    """Which bit of the other order's tile each bit is; past its last bit for a 0.

    Attributes:
        tile_sources: For each bit of a tile in tile order, uint32.
        vector_sources: For each bit of 32 tokens in vector order, uint32.
    """

    tile_sources: mx.array
    vector_sources: mx.array


@functools.lru_cache(maxsize=256)
def _orders(layout: TileLayout) -> _Orders:
    in_vector = _vector_places(layout)
    vector_bits = _WORD * layout.vector_words
    in_vectors = in_vector + vector_bits * np.arange(TILE)[:, None, None]
    places = _element_places if layout.kind == POLYNOMIAL else _pair_places
    in_tile = places(layout)
    tile_sources = np.full(_WORD * layout.tile_words, TILE * vector_bits)
    vector_sources = np.full(TILE * vector_bits, tile_sources.size)
    tile_sources[in_tile] = in_vectors
    vector_sources[in_vectors] = in_tile
    arrays = [mx.array(a.astype(np.uint32)) for a in (tile_sources, vector_sources)]
    mx.eval(arrays)
    return _Orders(*arrays)


def _moved(words: mx.array, sources: mx.array) -> mx.array:
    """Words (B, H, tiles, W) uint32 of the bits that ``sources`` names of ``words``'.

    Some tiles at a time: every bit is a byte in between.
    """
    tiles = words.shape[2]
    if tiles <= _TILES_AT_ONCE:
        return _moved_at_once(words, sources)
    parts = []
    for first in range(0, tiles, _TILES_AT_ONCE):
        some = words[:, :, first : first + _TILES_AT_ONCE]
        parts.append(_moved_at_once(some, sources))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=2)


def _moved_at_once(words: mx.array, sources: mx.array) -> mx.array:
    places = mx.arange(8, dtype=mx.uint8)
    bits = ((words.view(mx.uint8)[..., None] >> places) & 1).flatten(-2)
    bits = mx.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, 1)])
    moved = mx.take(bits, sources, axis=-1).reshape(*words.shape[:-1], -1, 8)
    return mx.sum(moved << places, axis=-1).astype(mx.uint8).view(mx.uint32)


def _vector_streams(layout: TileLayout) -> list[BitStream]:
    """A vector's streams, one behind the other: of codes, and of any norms."""
    widths = [layout.bits]
    if layout.kind == ANGLES:
        widths.append(layout.terms)
    return [BitStream((width,), layout.padded_dim // 2) for width in widths]


def _vector_places(layout: TileLayout) -> _Ints:
    """Bit (codes, code_bits) of a vector's words that each bit of its codes is."""
    if layout.kind == POLYNOMIAL:
        count = layout.padded_dim
        return _places_of(lambda codes: pack(codes, layout.bits), count, layout.bits)
    parts, words = [], 0
    for stream in _vector_streams(layout):
        places = _places_of(stream.pack, stream.count, stream.pattern[0])
        parts.append(places + _WORD * words)
        words += stream.words
    return np.concatenate(parts, axis=1)


def _places_of(packed: Callable[[mx.array], mx.array], count: int, bits: int) -> _Ints:
    """Which bit each bit of ``count`` codes is, found by packing it alone."""
    alone = mx.eye(count, dtype=mx.uint32)[:, None] << mx.arange(bits)[:, None]
    in_bytes = np.array(packed(alone)).view(np.uint8)
    places: _Ints = np.unpackbits(in_bytes, axis=-1, bitorder="little").argmax(-1)
    return places


def _element_places(layout: TileLayout) -> _Ints:
    """Bit (32, P, bits) of a tile that each bit of its tokens' codes is."""
    bits, dim = layout.bits, layout.padded_dim
    token, element = np.arange(TILE)[:, None, None], np.arange(dim)[None, :, None]
    row, within = np.divmod(token, _MAJORS)
    if layout.side == "keys":
        major = within
        minor, column = np.divmod(element, dim // 4)
        column, high = np.divmod(column, 2)
    else:
        minor, high = np.divmod(within, 2)
        major, column = np.divmod(element, dim // _MAJORS)
    unit, width = _units(column, dim)
    couple = _ROWS * (column % 4) + row
    fields, spare = divmod(_HALF, bits)
    fitting = fields * -(-_ROWS * width * bits // _HALF)
    bit, base = np.arange(bits), min(spare, 1)
    word, field = np.divmod(couple, fields)
    # Where a remaining couple's bits are: one by one in the words' spare bits.
    spare_word, place = np.divmod((couple - fitting) * bits + bit, max(spare, 1))
    spare_at = np.where(place == 0, 0, base + bits * fields + place - 1)
    remains = couple >= fitting
    word = np.where(remains, spare_word, word)
    at = np.where(remains, spare_at, base + bits * field + bit)
    return _in_tile(unit * bits + word, 4 * major + minor, _HALF * high + at)


def _pair_places(layout: TileLayout) -> _Ints:
    """Bit (32, P / 2, code_bits) of a tile that each bit of its tokens' codes is."""
    bits, dim = layout.code_bits, layout.padded_dim
    token, pair = np.arange(TILE)[:, None, None], np.arange(dim // 2)[None, :, None]
    row, within = np.divmod(token, _MAJORS)
    if layout.side == "keys":
        major = within
        minor, column = np.divmod(pair, dim // 8)
        unit, width = _units(column, dim)
        number = width * row + column % 4
    else:
        minor, high = np.divmod(within, 2)
        major, pair_of_slot = np.divmod(pair, dim // 16)
        unit, width = _units(2 * pair_of_slot, dim)
        number = width // 2 * (2 * row + high) + pair_of_slot % 2
    stream_bit = (_HALF * unit + number) * bits + np.arange(bits)
    return _in_tile(stream_bit // _WORD, 4 * major + minor, stream_bit % _WORD)


def _units(column: _Ints, dim: int) -> tuple[_Ints, _Ints]:
    """Which unit of its slot a column is in, and how many columns that unit has."""
    unit = column // 4
    return unit, np.minimum(4, dim // _MAJORS - 4 * unit)


def _in_tile(word: _Ints, slot: _Ints, bit: _Ints) -> _Ints:
    return (word * TILE + slot) * _WORD + bit

"""Codes of any widths as a stream of bits: for codecs whose codes are no plain grid.

Code i's own bits follow those of code i - 1, low bits first in uint32 words. Reads past
the end wrap to the start (tail-biting), so a read that is wider than a code's own bits
goes on into the codes after it. `packing` has the layout that scalar kernels read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

_WORD = 32


@dataclass(frozen=True)
class BitStream:
    """``count`` codes whose widths repeat a pattern, each at most 16 bits.

    >>> BitStream((3,), 64).words
    6
    """

    pattern: tuple[int, ...]
    count: int

    @property
    def words(self) -> int:
        """uint32 words of a vector; the last may hold spare bits."""
        return -(-self._bits // _WORD)

    @property
    def fills_words(self) -> bool:
        """Whether there are no spare bits, as reads that wrap need."""
        return self._bits % _WORD == 0

    @property
    def _bits(self) -> int:
        periods, rest = divmod(self.count, len(self.pattern))
        return periods * sum(self.pattern) + sum(self.pattern[:rest])

    def pack(self, codes: mx.array) -> mx.array:
        """Codes (..., count), each below 2**width, to uint32 (..., words)."""
        codes = codes.astype(mx.uint32)
        period = _period(self)
        tail = -self.count % period.elements
        if tail:
            codes = mx.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, tail)])
        codes = codes.reshape(*codes.shape[:-1], -1, period.elements)
        words: list[mx.array | None] = [None] * period.words
        for i, offset in enumerate(period.offsets):
            code, (word, shift) = codes[..., i], divmod(offset, _WORD)
            _or_into(words, word, code << shift if shift else code)
            if shift + period.widths[i] > _WORD:
                _or_into(words, word + 1, code >> (_WORD - shift))
        joined = mx.stack([w for w in words if w is not None], axis=-1)
        # Kernels count on words that lie together.
        return mx.contiguous(joined.reshape(*joined.shape[:-2], -1)[..., : self.words])

    def read(self, words: mx.array, width: int | None = None) -> mx.array:
        """The bits from each code's place on: (..., count) uint32.

        Args:
            words: (..., words) uint32.
            width: How many bits of each, at most 16; by default the code's own.
        """
        period = _period(self)
        following = mx.roll(words, -1, -1) if self.fills_words else words
        tail = -words.shape[-1] % period.words
        if tail:
            pad = [(0, 0)] * (words.ndim - 1) + [(0, tail)]
            words, following = mx.pad(words, pad), mx.pad(following, pad)
        lead = words.shape[:-1]
        words = words.reshape(*lead, -1, period.words)
        following = following.reshape(*lead, -1, period.words)
        codes = []
        for i, offset in enumerate(period.offsets):
            (word, shift), taken = divmod(offset, _WORD), width or period.widths[i]
            bits = words[..., word] >> shift if shift else words[..., word]
            if shift + taken > _WORD:
                # The next word is in this period, or the one that follows its last.
                inside = word + 1 < period.words
                more = words[..., word + 1] if inside else following[..., word]
                bits = bits | (more << (_WORD - shift))
            codes.append(bits & ((1 << taken) - 1))
        joined = mx.stack(codes, axis=-1)
        return joined.reshape(*lead, -1)[..., : self.count]


class _Period(NamedTuple):
    """The least number of elements that fills whole words, and where their bits are."""

    elements: int
    words: int
    offsets: Sequence[int]
    widths: Sequence[int]


@functools.cache
def _period(stream: BitStream) -> _Period:
    widths: list[int] = []
    offsets: list[int] = []
    end = 0
    while True:
        for width in stream.pattern:
            offsets.append(end)
            widths.append(width)
            end += width
        if end % _WORD == 0 or len(widths) >= stream.count:
            return _Period(len(widths), -(-end // _WORD), offsets, widths)


def _or_into(words: list[mx.array | None], index: int, bits: mx.array) -> None:
    present = words[index]
    words[index] = bits if present is None else present | bits

"""Codes as planes: what one shift and one mask take out of many words at a time.

A group of 16 elements is 8 pairs; `packing` puts as many pairs as fit into each 16-bit
half of a word. With 3 bits (five pairs in a word of the group's own, two in its byte of
a word shared by two groups, one in the bits left over):

    half of a word    [pair 0|pair 1|pair 2|pair 3|pair 4|s]    own
    byte of a word    [pair 5|pair 6|ss]                        shared
    left-over bits    [sss] = pair 7                            spare

The same bits of all those halves, over all groups, words and tokens, are one *plane*: a
matrix (tokens, rows) of codes that `cpu` multiplies as it lies. Nothing is gathered or
transposed, and codes are not even shifted down: `Planes.factors` makes up for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..polynomial import kernel_coefficients, odd_polynomial

#: Most terms of a polynomial in a plane's own unit; more leave the range of float32.
_MONIC_TERMS = 3
_GROUP = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the planes of a (bits, dim) lie; see ``packing.py``.

    Attributes:
        own_shifts: Shifts of the planes in own halves.
        field_shifts: Shifts of the planes in the groups' bytes of shared halves.
        spare_shifts: Shifts of the planes in what the spare bits spell.
        widths: Rows of each plane.
        order: Elements of the rows of all planes, below `padded`.
        shifts: Shift of each element's plane.
        padded: Elements of a vector, rounded up to whole groups.
        places: Row of each element when the planes' rows are joined.
    """

    own_shifts: list[int]
    field_shifts: list[int]
    spare_shifts: list[int]
    widths: list[int]
    order: mx.array
    shifts: list[int]
    padded: int
    places: mx.array

    @property
    def widest(self) -> int:
        """Rows of the planes that have most."""
        return max(self.widths)


@functools.cache
def layout_of(bits: int, dim: int) -> Layout:
    """Where the planes of vectors of ``dim`` elements at ``bits`` bits lie."""
    # How many pairs each kind of half holds; what they leave over holds the rest.
    groups = -(-dim // _GROUP)
    own_words = bits // 2
    per_own = 16 // bits if own_words else 0
    per_field = 8 // bits if bits % 2 else 0
    spare_pairs = 8 - own_words * per_own - per_field
    own_shifts = [bits * i for i in range(per_own)]
    field_shifts = [bits * i for i in range(per_field)]
    spare_shifts = [bits * i for i in range(spare_pairs)]

    def element(group: int, pair: int, half: int) -> int:
        return _GROUP * group + 2 * pair + half

    # Rows of each plane, in the order in which `Planes.levels` stacks its halves.
    planes = [
        [
            element(group, word * per_own + pair, half)
            for group in range(groups)
            for word in range(own_words)
            for half in (0, 1)
        ]
        for pair in range(per_own)
    ]
    planes += [
        [element(group, pair, half) for group in range(groups) for half in (0, 1)]
        for pair in range(own_words * per_own, 8)
    ]
    shifts = own_shifts + field_shifts + spare_shifts
    order = [element for plane in planes for element in plane]
    where = {element: row for row, element in enumerate(order)}
    shift_of = {e: s for s, plane in zip(shifts, planes, strict=True) for e in plane}
    layout = Layout(
        own_shifts=own_shifts,
        field_shifts=field_shifts,
        spare_shifts=spare_shifts,
        widths=[len(plane) for plane in planes],
        order=_index(order),
        shifts=[shift_of[element] for element in sorted(shift_of)],
        padded=len(order),
        places=_index([where[d] for d in range(dim)]),
    )
    mx.eval(layout.order, layout.places)
    return layout


def _index(numbers: list[int]) -> mx.array:
    return mx.array(numbers, dtype=mx.uint32)


@dataclass(frozen=True, eq=False)
class Planes:
    """How the codes of one codec become planes of levels.

    Attributes:
        bits: Bits of a code.
        dim: Elements of a vector.
        coefficients: Levels by code (`polynomial.levels_of`).
        layout: Where the planes lie.
    """

    bits: int
    dim: int
    coefficients: tuple[float, ...]
    layout: Layout

    def levels(self, words: mx.array) -> list[mx.array]:
        """Levels over `factors` (B, H, T, rows) float32 of every plane, in order.

        Args:
            words: (B, H, T, W) of some tokens.
        """
        halves = self._halves(words) if self.bits % 2 else [words.view(mx.uint16)]
        return self._at_once(*halves)

    @functools.cached_property
    def _at_once(self) -> Callable[..., list[mx.array]]:
        """One loop for all planes: each array of halves is read once."""
        compiled: Callable[..., list[mx.array]] = mx.compile(self._planes)
        return compiled

    def _planes(self, *halves: mx.array) -> list[mx.array]:
        """All planes, in order, of own halves and of fields, where there are any."""
        layout = self.layout
        sources = []
        if layout.own_shifts:
            sources.append((halves[0], layout.own_shifts))
        if layout.field_shifts:
            sources.append((halves[-1], layout.field_shifts))
        if layout.spare_shifts:
            stream = _spare_bits(self.bits)(*self._parts(halves))
            sources.append((stream, layout.spare_shifts))
        return [
            _level(some, self.bits, shift, self.coefficients)
            for some, shifts in sources
            for shift in shifts
        ]

    def _parts(self, halves: tuple[mx.array, ...]) -> list[mx.array]:
        """Halves as arrays with a row for each group, for what spare bits spell."""
        own, count = halves[0], self.bits // 2
        if count == 1:
            return list(halves)
        by_group = own.reshape(*own.shape[:-1], -1, count, 2)
        parts = [by_group[..., i, :].flatten(-2) for i in range(count)]
        return [*parts, *halves[1:]]

    def _halves(self, words: mx.array) -> list[mx.array]:
        """Words of odd widths to own halves and to fields, both group by group."""
        groups = -(-self.dim // _GROUP)
        in_chunks = groups // 2 * self.bits
        lead = words.shape[:-1]
        chunks = words[..., :in_chunks].reshape(*lead, -1, self.bits)
        own, shared = chunks[..., :-1].flatten(-2), chunks[..., -1]
        if groups % 2:  # the last group has a word of both kinds alone
            last = words[..., in_chunks:]
            own = mx.concatenate([own, last[..., :-1]], axis=-1)
            shared = mx.concatenate([shared, last[..., -1:]], axis=-1)
        fields = _fields(shared).view(mx.uint16)[..., : 2 * groups]
        return [own.view(mx.uint16), fields]

    def pieces(self, q: mx.array) -> list[mx.array]:
        """What each plane is multiplied with: (B, H, plane's rows, rows) of q.

        Args:
            q: (B, H, rows, dim) float32.
        """
        padding = self.layout.padded - q.shape[-1]
        if padding:
            q = mx.pad(q, [(0, 0)] * 3 + [(0, padding)])
        ordered = mx.take(q * self.factors, self.layout.order, axis=-1)
        ends = list(itertools.accumulate(self.layout.widths[:-1]))
        return list(mx.split(ordered.swapaxes(-1, -2), ends, axis=-2))

    @functools.cached_property
    def factors(self) -> mx.array:
        """What the levels of each element must be multiplied with: (padded,)."""
        gain, degree = 1.0, 0
        if len(self.coefficients) <= _MONIC_TERMS:
            gain = kernel_coefficients(self.coefficients)[0]
            degree = 2 * len(self.coefficients) - 1
        shifts = self.layout.shifts
        factors = mx.array([gain / 2.0 ** ((self.bits + s) * degree) for s in shifts])
        mx.eval(factors)
        return factors


@functools.cache
def planes_for(bits: int, dim: int, coefficients: tuple[float, ...]) -> Planes:
    """Made once for each codec."""
    return Planes(bits, dim, coefficients, layout_of(bits, dim))


@functools.cache
def _spare_bits(bits: int) -> Callable[..., mx.array]:
    """Joins the spare bits of own halves and the shared field, low ones first."""

    def join(*fields: mx.array) -> mx.array:
        parts, taken = [], 0
        for i, field in enumerate(fields):
            width = 16 if i < bits // 2 else 8
            spare = width % bits
            # To their place at once: with more shifts g++ does not vectorize it.
            down = width - spare - taken
            moved = field >> down if down >= 0 else field << -down
            parts.append(moved & (((1 << spare) - 1) << taken))
            taken += spare
        return functools.reduce(mx.bitwise_or, parts)

    compiled: Callable[..., mx.array] = mx.compile(join)
    return compiled


@mx.compile
def _fields(shared: mx.array) -> mx.array:
    """Shared words to two each, as uint64: the field of each group in its low bytes.

    What the shift drags from high to low halves lies above their fields.
    """
    return shared.astype(mx.uint64) | ((shared >> 8).astype(mx.uint64) << 32)


def _level(
    halves: mx.array, bits: int, shift: int, coefficients: tuple[float, ...]
) -> mx.array:
    """Halves to the levels of one plane, over its factor; to be compiled.

    All numbers are constants of the compiled loop. With the shift as an input, or with
    more operations in a row than MLX fuses, g++ makes it 1.5 to 4 times slower.
    """
    mask = (2**bits - 1) << shift
    middle = (2**bits - 1) / 2 * 2**shift
    unit = 2.0 ** (bits + shift)
    shape = kernel_coefficients(coefficients)[1:]
    u: mx.array = (halves & mask).astype(mx.float32) - middle
    if len(coefficients) > _MONIC_TERMS:
        return odd_polynomial(u * (1 / unit), coefficients)
    if len(coefficients) == 1:
        return u
    total: mx.array = u * u + shape[0] * unit**2
    if len(coefficients) == 3:
        total = total * total + shape[1] * unit**4
    return total * u

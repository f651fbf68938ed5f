"""Codes as planes: what one shift and one mask take out of many words at a time.

Owns where every element of a vector is in the planes of its bit layout (``packing.py``)
and how their levels are computed, in one pass over memory by `mx.compile`. What planes
are multiplied with is `cpu`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..codecs.kernel_format import KernelFormat
from ..polynomial import levels_of
from ..tokens import TokenArrays

#: Planes to a compiled pass: MLX fuses up to some twenty arrays.
_FUSED = 8
_GROUP = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the planes of a (bits, dim) lie; see ``packing.py``.

    Attributes:
        own: Indices of the halves of the groups' own words, group by group.
        shared: Indices of the halves of the shared words.
        own_shifts: Of the planes in own halves.
        shared_shifts: Of the planes in shared halves.
        late_shifts: Of the planes in what the spare bits spell.
        order: Element of each row of all planes, below `padded`.
        ends: Where planes end in `order`, but the last.
        places: Row of each element: the inverse of `order`.
    """

    own: mx.array
    shared: mx.array
    own_shifts: list[int]
    shared_shifts: list[int]
    late_shifts: list[int]
    order: mx.array
    padded: int
    ends: list[int]
    places: mx.array


@functools.cache
def layout_of(bits: int, dim: int) -> Layout:
    """Where the planes of vectors of ``dim`` elements at ``bits`` bits lie."""
    groups = -(-dim // _GROUP)
    own_words = bits // 2
    per_own = 16 // bits if own_words else 0
    per_shared = 8 // bits if bits % 2 else 0
    late = 8 - own_words * per_own - per_shared
    own, shared = [], []
    for group in range(groups):
        base = group // 2 * bits
        own += [base + group % 2 * own_words + i for i in range(own_words)]
        if bits % 2 and group % 2 == 0:
            shared.append(base + own_words * (1 if group + 1 == groups else 2))
    own_shifts = [bits * i for i in range(per_own)]
    shared_shifts = [8 * g + bits * i for g in (0, 1) for i in range(per_shared)]
    late_shifts = [bits * i for i in range(late)]

    def element(group: int, pair: int, half: int) -> int:
        return _GROUP * group + 2 * pair + half

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
        [
            element(2 * chunk + second, own_words * per_own + pair, half)
            for chunk in range(len(shared))
            for half in (0, 1)
        ]
        for second in (0, 1)
        for pair in range(per_shared)
    ]
    planes += [
        [element(group, pair, half) for group in range(groups) for half in (0, 1)]
        for pair in range(8 - late, 8)
    ]
    order = [element for plane in planes for element in plane]
    ends, end = [], 0
    for plane in planes[:-1]:
        end += len(plane)
        ends.append(end)
    where = {element: row for row, element in enumerate(order)}
    layout = Layout(
        own=_index([2 * word + half for word in own for half in (0, 1)]),
        shared=_index([2 * word + half for word in shared for half in (0, 1)]),
        own_shifts=own_shifts,
        shared_shifts=shared_shifts,
        late_shifts=late_shifts,
        order=_index(order),
        padded=max(max(order) + 1, dim),
        ends=ends,
        places=_index([where[d] for d in range(dim)]),
    )
    mx.eval(layout.own, layout.shared, layout.order, layout.places)
    return layout


def _index(numbers: list[int]) -> mx.array:
    return mx.array(numbers, dtype=mx.uint32)


def planes_of(format: KernelFormat, dim: int, codes: TokenArrays) -> list[mx.array]:
    """Levels (B, H, rows, T) float32 of every plane, in the order of `Layout`."""
    bits, terms = format.bits, format.coefficients
    layout = layout_of(bits, dim)
    halves = codes.arrays["words"].view(mx.uint16)[:, :, : codes.length]
    halves = mx.contiguous(halves.swapaxes(-1, -2))
    batch, heads, _, tokens = halves.shape
    groups, own_words = -(-dim // _GROUP), bits // 2
    planes, fields = [], []
    if own_words:
        own = halves[:, :, layout.own]
        planes += _extract(bits, terms, own, layout.own_shifts)
        by_group = own.reshape(batch, heads, groups, own_words, 2, tokens)
        fields = [by_group[:, :, :, i] for i in range(own_words)]
    if bits % 2:
        shared = halves[:, :, layout.shared]
        planes += _extract(bits, terms, shared, layout.shared_shifts)
        pairs = shared.reshape(batch, heads, -1, 1, 2, tokens)
        both = mx.concatenate([pairs, pairs >> 8], axis=3)
        fields.append(both.reshape(batch, heads, -1, 2, tokens)[:, :, :groups])
    if layout.late_shifts:
        stream = _late(bits)(*fields).reshape(batch, heads, -1, tokens)
        planes += _extract(bits, terms, stream, layout.late_shifts)
    return planes


@functools.cache
def _late(bits: int) -> Callable[..., mx.array]:
    """Joins the spare bits of own halves and the shared field, low ones first."""

    def join(*fields: mx.array) -> mx.array:
        stream, taken = mx.array(0, dtype=mx.uint16), 0
        for i, field in enumerate(fields):
            width = 16 if i < bits // 2 else 8
            spare = width % bits
            some = (field >> (width - spare)) & ((1 << spare) - 1)
            stream = stream | (some << taken)
            taken += spare
        return stream

    compiled: Callable[..., mx.array] = mx.compile(join)
    return compiled


def _extract(
    bits: int, terms: tuple[float, ...], halves: mx.array, shifts: list[int]
) -> list[mx.array]:
    planes = []
    for start in range(0, len(shifts), _FUSED):
        some = [_scalar(shift) for shift in shifts[start : start + _FUSED]]
        planes += _extractor(bits, terms)(halves, *some)
    return planes


@functools.cache
def _scalar(value: int) -> mx.array:
    array = mx.array(value, dtype=mx.uint16)
    mx.eval(array)
    return array


@functools.cache
def _extractor(bits: int, terms: tuple[float, ...]) -> Callable[..., list[mx.array]]:
    def extract(halves: mx.array, *shifts: mx.array) -> list[mx.array]:
        mask = 2**bits - 1
        return [levels_of((halves >> shift) & mask, bits, terms) for shift in shifts]

    compiled: Callable[..., list[mx.array]] = mx.compile(extract)
    return compiled

"""Decode steps on MLX's CPU device: attention on planes of codes, no gathers.

Owns that one path; `reference` is what it is held to, and does everything else here. A
*plane* is what one shift and one mask take out of a set of words: the same place of
every group, for all tokens. Its levels multiply as they lie, (words, tokens), against
the query elements they stand for, so that nothing is unpacked into the order of
elements. Shift, mask and polynomial are one pass over memory by `mx.compile`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..codecs.turboquant import TurboQuant
from ..codes import PackedCodes
from ..polynomial import levels_of
from ..segments import Segments
from . import reference

#: Query tokens of a decode step; more of them amortise the reference's decoding.
MAX_ROWS = 8
#: Planes to a compiled pass: MLX fuses up to some twenty arrays.
_FUSED = 8
_GROUP = 16


class Cpu:
    """Plain MLX operations in the order a CPU likes."""

    name = "cpu"
    rotate = staticmethod(reference.rotate)
    encode = staticmethod(reference.encode)

    def attend(
        self,
        q: mx.array,
        keys: Segments,
        values: Segments,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As `reference.attend`, for what `refuse` has nothing against."""
        if q.shape[2] > MAX_ROWS:
            return reference.attend(q, keys, values, scale, mask, sinks)
        batch, heads, total, _ = keys.shape
        steps = q.shape[2]
        rows = q.shape[1] // heads * steps
        with mx.stream(_side_stream()):  # beside the keys, on another core
            assert values.packed is not None
            assert isinstance(values.codec, TurboQuant)
            planes = _planes(values.codec, values.packed)
        q_rot = keys.codec.rotation.forward(q) * scale
        q_rot = q_rot.reshape(batch, heads, rows, -1)
        logits = _logits(q_rot, keys).reshape(batch, -1, steps, total)
        if isinstance(mask, str):
            mask = mx.arange(total) <= mx.arange(total - steps, total)[:, None]
        if isinstance(mask, mx.array):
            if mask.dtype == mx.bool_:
                logits = mx.where(mask, logits, -mx.inf)
            else:
                logits = logits + mask.astype(mx.float32)
        weights = _softmax(logits, sinks, q_rot, keys.mean)
        out_rot = _weigh(weights.reshape(batch, heads, rows, total), values, planes)
        out_rot = out_rot.reshape(batch, q.shape[1], steps, -1)
        return values.codec.rotation.inverse(out_rot).astype(q.dtype)


def refuse(keys: Segments, values: Segments) -> str | None:
    """Why planes cannot serve these, or None."""
    if keys.packed is None or values.packed is None:
        return "nothing is packed yet"
    for side in (keys, values):
        if not isinstance(side.codec, TurboQuant):
            return f"codec {side.codec.spec} has no planes"
    return None


def _logits(q_rot: mx.array, keys: Segments) -> mx.array:
    """Of all tokens, the mean's share left out: (B, H, rows, T) float32."""
    parts = []
    shift: mx.array | float = 0.0
    if keys.mean is not None:
        shift = q_rot @ keys.mean.swapaxes(-1, -2)
    if keys.sink is not None:
        parts.append(_dot(q_rot, keys.sink) - shift)
    assert keys.packed is not None
    assert isinstance(keys.codec, TurboQuant)
    layout = _layout(keys.codec.spec.bits, keys.codec.dim)
    padded = mx.pad(q_rot, [(0, 0)] * 3 + [(0, layout.padded - keys.codec.dim)])
    pieces = mx.split(padded[..., layout.order], layout.ends, axis=-1)
    packed: mx.array | None = None
    for piece, plane in zip(pieces, _planes(keys.codec, keys.packed), strict=True):
        packed = piece @ plane if packed is None else mx.addmm(packed, piece, plane)
    assert packed is not None
    parts.append(packed * _scales(keys.packed))
    parts.append(_dot(q_rot, keys.recent) - shift)
    return mx.concatenate(parts, axis=-1)


def _weigh(weights: mx.array, values: Segments, planes: list[mx.array]) -> mx.array:
    """Weights (B, H, rows, T) times the values: (B, H, rows, D), rotated."""
    first = values.sink_length
    last = first + values.packed_length
    out = weights[..., last:] @ values.recent.astype(mx.float32)
    if values.sink is not None:
        out = out + weights[..., :first] @ values.sink.astype(mx.float32)
    assert values.packed is not None
    assert isinstance(values.codec, TurboQuant)
    layout = _layout(values.codec.spec.bits, values.codec.dim)
    scaled = weights[..., first:last] * _scales(values.packed)
    pieces = [scaled @ plane.swapaxes(-1, -2) for plane in planes]
    return out + mx.concatenate(pieces, axis=-1)[..., layout.places]


def _softmax(
    logits: mx.array, sinks: mx.array | None, q_rot: mx.array, mean: mx.array | None
) -> mx.array:
    """Over tokens, and learned sink logits (Hq,) that carry no value."""
    if sinks is None:
        return mx.softmax(logits, axis=-1, precise=True)
    batch, query_heads, steps, _ = logits.shape
    extra = mx.broadcast_to(
        sinks.astype(mx.float32)[None, :, None, None], (batch, query_heads, steps, 1)
    )
    if mean is not None:
        shift = q_rot @ mean.swapaxes(-1, -2)
        extra = extra - shift.reshape(batch, query_heads, steps, 1)
    joined = mx.concatenate([extra, logits], axis=-1)
    return mx.softmax(joined, axis=-1, precise=True)[..., 1:]


def _dot(q_rot: mx.array, keys: mx.array) -> mx.array:
    return q_rot @ keys.astype(mx.float32).swapaxes(-1, -2)


def _scales(codes: PackedCodes) -> mx.array:
    return codes.view("scales").astype(mx.float32).swapaxes(-1, -2)


@dataclass(frozen=True, eq=False)
class _Layout:
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
def _layout(bits: int, dim: int) -> _Layout:
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
    layout = _Layout(
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


def _planes(codec: TurboQuant, codes: PackedCodes) -> list[mx.array]:
    """Levels (B, H, rows, T) float32 of every plane, in the order of `_Layout`."""
    bits, dim = codec.spec.bits, codec.dim
    layout = _layout(bits, dim)
    halves = codes.arrays["words"].view(mx.uint16)[:, :, : codes.length]
    halves = mx.contiguous(halves.swapaxes(-1, -2))
    batch, heads, _, tokens = halves.shape
    groups, own_words = -(-dim // _GROUP), bits // 2
    planes, fields = [], []
    if own_words:
        own = halves[:, :, layout.own]
        planes += _extract(bits, dim, own, layout.own_shifts)
        by_group = own.reshape(batch, heads, groups, own_words, 2, tokens)
        fields = [by_group[:, :, :, i] for i in range(own_words)]
    if bits % 2:
        shared = halves[:, :, layout.shared]
        planes += _extract(bits, dim, shared, layout.shared_shifts)
        pairs = shared.reshape(batch, heads, -1, 1, 2, tokens)
        both = mx.concatenate([pairs, pairs >> 8], axis=3)
        fields.append(both.reshape(batch, heads, -1, 2, tokens)[:, :, :groups])
    if layout.late_shifts:
        stream = _late(bits)(*fields).reshape(batch, heads, -1, tokens)
        planes += _extract(bits, dim, stream, layout.late_shifts)
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
    bits: int, dim: int, halves: mx.array, shifts: list[int]
) -> list[mx.array]:
    planes = []
    for start in range(0, len(shifts), _FUSED):
        some = [_scalar(shift) for shift in shifts[start : start + _FUSED]]
        planes += _extractor(bits, dim)(halves, *some)
    return planes


@functools.cache
def _side_stream() -> mx.Stream:
    return mx.new_stream(mx.cpu)


@functools.cache
def _scalar(value: int) -> mx.array:
    array = mx.array(value, dtype=mx.uint16)
    mx.eval(array)
    return array


@functools.cache
def _extractor(bits: int, dim: int) -> Callable[..., list[mx.array]]:
    def extract(halves: mx.array, *shifts: mx.array) -> list[mx.array]:
        mask = 2**bits - 1
        return [levels_of((halves >> shift) & mask, dim, bits) for shift in shifts]

    compiled: Callable[..., list[mx.array]] = mx.compile(extract)
    return compiled

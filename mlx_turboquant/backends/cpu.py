"""Decode steps on MLX's CPU device: attention on planes of codes, no gathers.

Owns that one path; `reference` is what it is held to, and does everything else here.
The levels of a plane (`planes`: the same place of every group, for all tokens) are
multiplied as they lie with the query elements they stand for, so that nothing is
unpacked into the order of elements.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from ..codecs.turboquant import TurboQuant
from ..codes import PackedCodes
from ..segments import Segments
from . import reference
from .planes import layout_of, planes_of

#: Query tokens of a decode step; more of them amortise the reference's decoding.
MAX_ROWS = 8


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
            planes = planes_of(values.codec, values.packed)
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
    layout = layout_of(keys.codec.spec.bits, keys.codec.dim)
    padded = mx.pad(q_rot, [(0, 0)] * 3 + [(0, layout.padded - keys.codec.dim)])
    pieces = mx.split(padded[..., layout.order], layout.ends, axis=-1)
    packed: mx.array | None = None
    for piece, plane in zip(pieces, planes_of(keys.codec, keys.packed), strict=True):
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
    layout = layout_of(values.codec.spec.bits, values.codec.dim)
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


@functools.cache
def _side_stream() -> mx.Stream:
    return mx.new_stream(mx.cpu)

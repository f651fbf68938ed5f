"""Decode steps on MLX's CPU device: attention on planes of codes, no gathers.

Owns that one path; `reference` is what it is held to, and does everything else here.
The levels of a plane (`planes`: the same place of every group, for all tokens) are
multiplied as they lie with the query elements they stand for, so that nothing is
unpacked into the order of elements.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from ..codecs.kernel_format import POLYNOMIAL, KernelFormat
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from ..transform import PageMeans
from . import reference
from .planes import layout_of, planes_of

#: Query tokens of a decode step; more of them amortise the reference's decoding.
MAX_ROWS = 8


class Cpu:
    """Plain MLX operations in the order a CPU likes."""

    name = "cpu"
    decode = staticmethod(reference.decode)
    encode = staticmethod(reference.encode)

    def attend(
        self,
        q: mx.array,
        keys: CompressedTokens,
        values: CompressedTokens,
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
            planes = planes_of(_format(values), values.codec.dim, values.packed)
        dtype, q = q.dtype, q.astype(mx.float32) * scale
        q_rot = keys.basis.encode_query(q).reshape(batch, heads, rows, -1)
        logits = _logits(q.reshape(batch, heads, rows, -1), q_rot, keys)
        logits = logits.reshape(batch, -1, steps, total)
        if isinstance(mask, str):
            mask = mx.arange(total) <= mx.arange(total - steps, total)[:, None]
        if isinstance(mask, mx.array):
            if mask.dtype == mx.bool_:
                logits = mx.where(mask, logits, -mx.inf)
            else:
                logits = logits + mask.astype(mx.float32)
        weights = _softmax(logits, sinks).reshape(batch, heads, rows, total)
        shape = (batch, -1, steps, values.shape[3])
        out_rot = _weigh_packed(weights, values, planes).reshape(shape)
        out = values.basis.decode(out_rot) + _weigh_plain(weights, values).reshape(
            shape
        )
        return out.astype(dtype)


def refuse(keys: CompressedTokens, values: CompressedTokens) -> str | None:
    """Why planes cannot serve these, or None."""
    if keys.packed is None or values.packed is None:
        return "nothing is packed yet"
    for side in (keys, values):
        format = side.codec.kernel_format
        if format is None or format.kind != POLYNOMIAL:
            return f"codec {side.codec.spec} has no planes"
    return None


def _format(side: CompressedTokens) -> KernelFormat:
    assert side.codec.kernel_format is not None
    return side.codec.kernel_format


def _logits(q: mx.array, q_rot: mx.array, keys: CompressedTokens) -> mx.array:
    """Of all tokens, (B, H, rows, T) float32, for both spellings of the queries."""
    assert keys.packed is not None
    format, dim = _format(keys), keys.codec.dim
    layout = layout_of(format.bits, dim)
    padded = mx.pad(q_rot, [(0, 0)] * 3 + [(0, layout.padded - keys.codec.dim)])
    pieces = mx.split(padded[..., layout.order], layout.ends, axis=-1)
    packed: mx.array | None = None
    for piece, plane in zip(pieces, planes_of(format, dim, keys.packed), strict=True):
        packed = piece @ plane if packed is None else mx.addmm(packed, piece, plane)
    assert packed is not None
    packed = packed * _scales(keys.packed)
    if keys.means is not None:
        packed = packed + _mean_logits(q_rot, keys.means, keys.packed_length)
    parts = [packed, _dot(q, keys.recent)]
    if keys.sink is not None:
        parts.insert(0, _dot(q, keys.sink))
    return mx.concatenate(parts, axis=-1)


def _mean_logits(q_rot: mx.array, means: PageMeans, tokens: int) -> mx.array:
    """Of the mean of each packed token: (B, H, rows, tokens or 1)."""
    logits = _dot(q_rot, means.rows[:, :, : means.count])
    if means.count == 1:
        return logits
    return mx.repeat(logits, means.page, axis=-1)[..., :tokens]


def _weigh_packed(
    weights: mx.array, values: CompressedTokens, planes: list[mx.array]
) -> mx.array:
    """Weights (B, H, rows, T) times the packed values: (B, H, rows, D), rotated."""
    first = values.sink_length
    assert values.packed is not None
    layout = layout_of(_format(values).bits, values.codec.dim)
    scaled = weights[..., first : first + values.packed_length]
    scaled = scaled * _scales(values.packed)
    pieces = [scaled @ plane.swapaxes(-1, -2) for plane in planes]
    return mx.concatenate(pieces, axis=-1)[..., layout.places]


def _weigh_plain(weights: mx.array, values: CompressedTokens) -> mx.array:
    """Weights times sink and recent values: (B, H, rows, D), not rotated."""
    first = values.sink_length
    last = first + values.packed_length
    out = weights[..., last:] @ values.recent.astype(mx.float32)
    if values.sink is not None:
        out = out + weights[..., :first] @ values.sink.astype(mx.float32)
    return out


def _softmax(logits: mx.array, sinks: mx.array | None) -> mx.array:
    """Over tokens, and learned sink logits (Hq,) that carry no value."""
    if sinks is None:
        return mx.softmax(logits, axis=-1, precise=True)
    extra = sinks.astype(mx.float32)[None, :, None, None]
    extra = mx.broadcast_to(extra, (*logits.shape[:3], 1))
    joined = mx.concatenate([extra, logits], axis=-1)
    return mx.softmax(joined, axis=-1, precise=True)[..., 1:]


def _dot(q: mx.array, keys: mx.array) -> mx.array:
    return q @ keys.astype(mx.float32).swapaxes(-1, -2)


def _scales(codes: TokenArrays) -> mx.array:
    return codes.view("scales").astype(mx.float32).swapaxes(-1, -2)


@functools.cache
def _side_stream() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)

"""MLX's CPU device: decode steps on planes of codes, no gathers.

Owns that one path. Steps of more tokens are `long_attention`'s, encoding is
`scalar_encode`'s; `reference` is what all are held to, and does everything else here.
The levels of a plane (`planes`: the same place of every group, for all tokens) are
multiplied as they lie with the query elements they stand for, so that nothing is
unpacked into the order of elements. Where tokens are many, two of MLX's streams take
blocks of them by turns, each on a core.
"""

from __future__ import annotations

import functools
import itertools

import mlx.core as mx

from ..blas import prefer_openblas
from ..codecs.kernel_format import POLYNOMIAL
from ..codecs.turboquant import TurboQuant
from ..quantizer import PageMeans, Quantizer
from ..segments import CompressedTokens
from ..tokens import Codes, TokenArrays
from .call import AttendCall
from .exponential import softmax_parts
from .long_attention import attend_long, masked
from .planes import Planes, planes_for
from .reference import Reference, packed_of
from .scalar_encode import MAX_BITS, encoder_for

#: Vectors whose levels are made at once, at most: they stay in a cache.
_BLOCK = 16384
#: Multiplications of a product that OpenBLAS leaves to the thread that calls it. It
#: does larger ones one after the other, so that two streams would wait for each other.
_ALONE = 1 << 18
#: Packed tokens times terms of their polynomial from which two streams take half each.
_SHARED = 6144
#: Query tokens of a decode step; for more of them keys and values are decoded.
MAX_STEP = 8

Block = tuple[slice, mx.Stream | mx.ThreadLocalStream]


class Cpu(Reference):
    """Plain MLX operations in the order a CPU likes."""

    @property
    def name(self) -> str:
        """What `explain` calls it."""
        return "cpu"

    def refuse(self, keys: Quantizer, values: Quantizer) -> str | None:
        """Why planes cannot serve what these encode, or None."""
        for codec in (keys.codec, values.codec):
            form = codec.kernel_format
            if form is None or form.kind != POLYNOMIAL:
                return f"codec {codec.spec} has no planes"
        return None

    def encode(self, quantizer: Quantizer, x: mx.array, first: int) -> TokenArrays:
        """As `Reference.encode`, to the same bits."""
        codec = quantizer.codec
        if not isinstance(codec, TurboQuant) or codec.bits > MAX_BITS:
            return super().encode(quantizer, x, first)
        return encoder_for(codec).encode(quantizer.encode_rot(x, first))

    def attend(self, call: AttendCall) -> mx.array:
        """As `Reference.attend`, in float32."""
        q, keys, values = call.q, call.keys, call.values
        if q.shape[2] > MAX_STEP:
            return attend_long(call, self)
        batch, kv_heads, total, _ = keys.shape
        steps = q.shape[2]
        rows = q.shape[1] // kv_heads * steps
        k_planes, v_planes = _planes_of(keys), _planes_of(values)
        dtype, q = q.dtype, q.astype(mx.float32) * call.scale
        q_rot = keys.quantizer.transform.encode_query(q)
        logits = _logits(
            q.reshape(batch, kv_heads, rows, -1),
            q_rot.reshape(batch, kv_heads, rows, -1),
            keys,
            k_planes,
        )
        logits = logits.reshape(batch, -1, steps, total)
        mask = call.mask
        if isinstance(mask, str):
            mask = mx.arange(total) <= mx.arange(total - steps, total)[:, None]
        if isinstance(mask, mx.array):
            logits = masked(logits, mask)
        weights, divisor = softmax_parts(logits, call.sink_logits)
        weights = weights.reshape(batch, kv_heads, rows, total)
        shape = (batch, -1, steps, values.shape[3])
        out_rot = _weigh_packed(weights, values, v_planes)
        out = values.quantizer.transform.decode(out_rot.reshape(shape))
        out = out + _weigh_uncompressed(weights, values).reshape(shape)
        return (out / divisor).astype(dtype)


def _planes_of(side: CompressedTokens) -> Planes:
    codec = side.quantizer.codec
    form = codec.kernel_format
    if form is None:
        raise ValueError(f"codec {codec.spec} has no planes; see Cpu.refuse")
    return planes_for(form.bits, codec.dim, form.coefficients)


def _blocks(codes: Codes, planes: Planes, rows: int) -> list[Block]:
    """Tokens, in order, and the stream that takes them, for so many rows of queries."""
    batch, heads = codes.arrays["words"].shape[:2]
    most = min(_BLOCK // (batch * heads), _ALONE // (rows * planes.layout.widest))
    count = -(-codes.length // max(1, most))
    streams: list[mx.Stream | mx.ThreadLocalStream] = [mx.default_stream(mx.cpu)]
    if codes.length * len(planes.coefficients) >= _SHARED:
        streams.append(_side_stream())
        count += count % 2  # alike for both
    ends = [codes.length * i // count for i in range(count + 1)]
    return [
        (slice(*pair), streams[i % len(streams)])
        for i, pair in enumerate(itertools.pairwise(ends))
    ]


def _logits(
    q: mx.array, q_rot: mx.array, keys: CompressedTokens, planes: Planes
) -> mx.array:
    """Logits of all tokens (B, H, rows, T) float32, from both spellings of q."""
    codes = packed_of(keys)
    words = codes.view("words")
    pieces = planes.pieces(q_rot)
    blocks = []
    for some, stream in _blocks(codes, planes, q.shape[2]):
        with mx.stream(stream):
            blocks.append(_products(pieces, planes.levels(words[:, :, some])))
    packed = mx.concatenate(blocks, axis=-1) if len(blocks) > 1 else blocks[0]
    packed = packed * _scales(codes)
    if keys.quantizer.means is not None:
        packed = packed + _mean_logits(q_rot, keys.quantizer.means, codes.length)
    parts = [packed, _dot(q, keys.recent_tokens)]
    if keys.sink is not None:
        parts.insert(0, _dot(q, keys.sink))
    return mx.concatenate(parts, axis=-1)


def _products(pieces: list[mx.array], levels: list[mx.array]) -> mx.array:
    """The sum of all planes' products (B, H, rows, tokens).

    A chain, so that each plane is multiplied while it is in the cache.

    Args:
        pieces: What each plane is multiplied with (B, H, plane's rows, rows).
        levels: The planes (B, H, tokens, plane's rows).
    """
    if prefer_openblas():
        out = levels[0] @ pieces[0]
        for piece, plane in zip(pieces[1:], levels[1:], strict=True):
            out = mx.addmm(out, plane, piece)
        return out.swapaxes(-1, -2)
    # The reference BLAS takes 3 times as long for planes times q.
    out = pieces[0].swapaxes(-1, -2) @ levels[0].swapaxes(-1, -2)
    for piece, plane in zip(pieces[1:], levels[1:], strict=True):
        out = mx.addmm(out, piece.swapaxes(-1, -2), plane.swapaxes(-1, -2))
    return out


def _mean_logits(q_rot: mx.array, means: PageMeans, tokens: int) -> mx.array:
    """Logits of each packed token's mean: (B, H, rows, tokens)."""
    logits = _dot(q_rot, means.state["keys"])
    return mx.repeat(logits, means.page, axis=-1)[..., :tokens]


def _weigh_packed(
    weights: mx.array, values: CompressedTokens, planes: Planes
) -> mx.array:
    """Weights (B, H, rows, T) times the packed values: (B, H, rows, D), rotated."""
    codes = packed_of(values)
    words = codes.view("words")
    first = values.sink_length
    scaled = weights[..., first : first + codes.length] * _scales(codes)
    sums: dict[mx.Stream | mx.ThreadLocalStream, list[mx.array]] = {}
    for some, stream in _blocks(codes, planes, weights.shape[2]):
        with mx.stream(stream):
            part, levels = scaled[..., some], planes.levels(words[:, :, some])
            if stream not in sums:
                sums[stream] = [part @ plane for plane in levels]
                continue
            sums[stream] = [
                mx.addmm(total, part, plane)
                for total, plane in zip(sums[stream], levels, strict=True)
            ]
    joined = [mx.concatenate(totals, axis=-1) for totals in sums.values()]
    out = functools.reduce(mx.add, joined)
    dim = values.shape[-1]
    return out[..., planes.layout.places] * planes.factors[:dim]


def _weigh_uncompressed(weights: mx.array, values: CompressedTokens) -> mx.array:
    """Weights times sink and recent values: (B, H, rows, D), not rotated."""
    first = values.sink_length
    last = first + values.packed_length
    out = weights[..., last:] @ values.recent_tokens.astype(mx.float32)
    if values.sink is not None:
        out = out + weights[..., :first] @ values.sink.astype(mx.float32)
    return out


def _dot(q: mx.array, keys: mx.array) -> mx.array:
    return q @ keys.astype(mx.float32).swapaxes(-1, -2)


def _scales(codes: Codes) -> mx.array:
    return codes.view("scales").astype(mx.float32).swapaxes(-1, -2)


@functools.cache
def _side_stream() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)

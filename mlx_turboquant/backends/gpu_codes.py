"""Tokens in and out of codes by kernels: encode a page, decode for prefill.

Owns the launches of ``kernels/codes.py``, each held to a definition in plain mx:
`reference.encode` and the codecs' `decode`.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..codecs import Codec
from ..codecs.scalar import ScalarCodec
from ..codecs.scale import RULES
from ..codecs.trellis import SHARPNESS, Trellis
from ..codecs.turboangle import TurboAngle
from ..codecs.turboquant import TurboQuant
from ..kernels.arguments import pack
from ..kernels.codes import (
    DECODE_CODES,
    ENCODE_SCALAR,
    ENCODE_TRELLIS,
    DecodeArguments,
    EncodeArguments,
)
from ..kernels.kernel import Launch, Launcher
from ..packing import words_per_vector
from ..tokens import TokenArrays
from ..transform import ChannelTransform, PageMeans
from . import reference
from .formats import Readable, decode_params_of, format_of
from .plan import MAX_DIM, rotates, signs_of, zeros

#: Angles that a kernel has a table of.
MAX_ANGLES = 256
_SIMDGROUPS = 4
_DECODE_THREADS = 128
#: Vectors that a simdgroup searches for: their ways back go side by side.
_SEARCHES = 2
#: Threadgroup memory that one threadgroup's searches may take, in bytes.
_SEARCH_BYTES = 24 << 10


def refuse(*codecs: Codec) -> str | None:
    """Why the attention and decode kernels cannot take a codec, or None."""
    for codec in codecs:
        if not isinstance(codec, Readable):
            return f"codec {codec.spec} has no kernel"
        if codec.dim > MAX_DIM:
            return f"head_dim {codec.dim} is over {MAX_DIM}"
        if isinstance(codec, TurboAngle) and codec.bins > MAX_ANGLES:
            return f"{codec.bins} angles are over {MAX_ANGLES}"
    return None


def encode(
    launcher: Launcher,
    keys: mx.array,
    values: mx.array,
    means: PageMeans | None,
    first: int,
    bases: tuple[ChannelTransform, ChannelTransform],
    codecs: tuple[Codec, Codec],
) -> tuple[TokenArrays, TokenArrays]:
    """Both sides of some tokens; arguments as `reference.encode`'s, any strides.

    Codecs without an encoding kernel are left to the reference.
    """
    return (
        _encode_side(launcher, keys, means, first, bases[0], codecs[0]),
        _encode_side(launcher, values, None, first, bases[1], codecs[1]),
    )


def _encode_side(
    launcher: Launcher,
    x: mx.array,
    means: PageMeans | None,
    first: int,
    basis: ChannelTransform,
    codec: Codec,
) -> TokenArrays:
    if codec.dim > MAX_DIM or not isinstance(codec, TurboQuant | Trellis):
        return reference.encode_side(x, means, first, basis, codec)
    batch, heads, tokens, dim = x.shape
    inside = rotates(basis.rotation)
    template: dict[str, Any] = {
        "T": x.dtype,
        "DIM": dim,
        "ROTATE": inside,
        "CENTER": means is not None,
        "RULE": RULES.index(codec.scale),
    }
    if isinstance(codec, TurboQuant):
        kernel, table = ENCODE_SCALAR, _scalar_table(codec)
        words, vectors, simdgroups = words_per_vector(codec.bits, dim), 1, _SIMDGROUPS
        template |= {"BITS": codec.bits, "GAINS": len(codec.gains)}
    else:
        kernel, table, words = ENCODE_TRELLIS, _branch_levels(codec), codec.pairs.words
        count = 2 * codec.pairs.count
        # Of each search: its steps and half a byte a branch; two buffers of 128 costs.
        vectors = max(1, min(_SEARCHES, _SEARCH_BYTES // (20 * count)))
        simdgroups = max(
            1, min(_SIMDGROUPS, _SEARCH_BYTES // (20 * count * vectors + 1024))
        )
        template |= {
            "COUNT": count,
            "VECTORS": vectors,
            "EVEN": codec.widths[0],
            "ODD": codec.widths[-1],
        }
    template["SIMDGROUPS"] = simdgroups
    groups = -(-batch * heads * tokens // (simdgroups * vectors))
    launch = Launch(
        kernel,
        list(template.items()),
        grid=(32 * simdgroups * groups, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(batch, heads, tokens, words), (batch, heads, tokens, 1)],
        output_dtypes=[mx.uint32, mx.float16],
    )
    args = EncodeArguments(tokens, heads, batch, first, means.page if means else 1)
    arrays = launcher(
        launch,
        [
            x if inside else basis.encode(x).astype(x.dtype),
            signs_of(basis, batch * heads, out=False),
            means.rows if means else zeros(mx.float16),
            table,
            pack(args),
        ],
    )
    return TokenArrays(dict(zip(("words", "scales"), arrays, strict=True)), tokens)


def decode(
    launcher: Launcher,
    codec: Readable,
    codes: TokenArrays,
    dtype: mx.Dtype,
    heads: slice,
) -> mx.array:
    """As the codec's `decode`: (B, heads, length, dim), still rotated."""
    words, scales = codes.view("words", heads), codes.view("scales", heads)
    batch, count, tokens, _ = words.shape
    format, dim = format_of(codec), codec.dim
    threads = batch * count * tokens * -(-dim // 16)
    if isinstance(codec, ScalarCodec):
        params = _coefficients(codec.coefficients)
    else:
        params = decode_params_of(codec)
    launch = Launch(
        DECODE_CODES,
        [
            ("T", dtype),
            ("DIM", dim),
            ("KIND", format.kind),
            ("BITS", format.bits),
            ("TERMS", format.terms),
            ("THREADS", _DECODE_THREADS),
        ],
        grid=(_DECODE_THREADS * -(-threads // _DECODE_THREADS), 1, 1),
        threadgroup=(_DECODE_THREADS, 1, 1),
        output_shapes=[(batch, count, tokens, dim)],
        output_dtypes=[dtype],
    )
    args = DecodeArguments(tokens, count, batch)
    return launcher(launch, [words, scales, params, pack(args)])[0]


@functools.lru_cache(maxsize=64)
def _scalar_table(codec: TurboQuant) -> mx.array:
    """Levels, boundaries, inverse gains: float32, at least 8 elements."""
    inverse_gains = mx.array([1 / gain for gain in codec.gains])
    book = codec.book
    table = mx.concatenate([book.levels, book.boundaries, inverse_gains, mx.zeros(8)])
    mx.eval(table)
    return table


@functools.lru_cache(maxsize=64)
def _branch_levels(codec: Trellis) -> mx.array:
    """Levels of even elements by window, of odd ones, unit: (513,) float32.

    As the search has them: in parts of a unit.
    """
    both = mx.concatenate([codec.levels[0], codec.levels[-1]]) * SHARPNESS
    levels = mx.concatenate([both, mx.array([codec.unit / SHARPNESS])])
    mx.eval(levels)
    return levels


@functools.cache
def _coefficients(terms: tuple[float, ...]) -> mx.array:
    array = mx.array([*terms, *[0.0] * 8])
    mx.eval(array)
    return array

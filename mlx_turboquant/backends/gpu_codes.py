"""Tokens in and out of codes by kernels: encode a page, decode for prefill.

Owns the launches of ``kernels/tokens.py``, each held to a definition in plain mx:
`reference.encode` and the codecs' `decode`.
"""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import mlx.core as mx

from ..codecs import Codec
from ..codecs.scalar import ScalarCodec
from ..codecs.scale import RULES
from ..codecs.trellis import SHARPNESS, Trellis
from ..codecs.turboangle import TurboAngle
from ..codecs.turboquant import TurboQuant
from ..kernels.kernel import Launcher
from ..kernels.tokens import DECODE_TOKENS, ENCODE_TOKENS, ENCODE_TRELLIS
from ..packing import words_per_vector
from ..tokens import TokenArrays
from ..transform import ChannelTransform, PageMeans
from . import reference
from .formats import Readable, format_of, given_of
from .plan import MAX_DIM, rotates, signs_of, sizes_array, zeros

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
    if not _in_one_launch(codecs, keys.dtype, values.dtype):
        return (
            _encode_side(launcher, keys, means, first, bases[0], codecs[0]),
            _encode_side(launcher, values, None, first, bases[1], codecs[1]),
        )
    k_codec, v_codec = codecs
    batch, heads, tokens, _ = keys.shape
    tables = _tables(k_codec, v_codec)
    lead = (batch, heads, tokens)
    k_inside, v_inside = (rotates(basis.rotation) for basis in bases)
    k_words, k_scales, v_words, v_scales = launcher(
        ENCODE_TOKENS,
        [
            keys if k_inside else bases[0].encode(keys).astype(keys.dtype),
            values if v_inside else bases[1].encode(values).astype(values.dtype),
            signs_of(bases[0], batch * heads, out=False),
            signs_of(bases[1], batch * heads, out=False),
            means.rows if means else zeros(mx.float16),
            tables["k_levels"],
            tables["k_boundaries"],
            tables["v_levels"],
            tables["v_boundaries"],
            tables["inverse_gains"],
            sizes_array((tokens, heads, batch, first, means.page if means else 1)),
        ],
        {
            **_encode_template(k_codec, v_codec),
            "T": keys.dtype,
            "ROTATE_K": k_inside,
            "ROTATE_V": v_inside,
            "CENTER": means is not None,
        },
        grid=(
            32 * _SIMDGROUPS * -(-batch * heads * tokens // _SIMDGROUPS),
            2,
            1,
        ),
        threadgroup=(32 * _SIMDGROUPS, 1, 1),
        output_shapes=[
            (*lead, words_per_vector(k_codec.bits, k_codec.dim)),
            (*lead, 1),
            (*lead, words_per_vector(v_codec.bits, v_codec.dim)),
            (*lead, 1),
        ],
        output_dtypes=[mx.uint32, mx.float16, mx.uint32, mx.float16],
    )
    return (
        TokenArrays({"words": k_words, "scales": k_scales}, tokens),
        TokenArrays({"words": v_words, "scales": v_scales}, tokens),
    )


def _in_one_launch(
    codecs: tuple[Codec, Codec], *dtypes: mx.Dtype
) -> TypeGuard[tuple[TurboQuant, TurboQuant]]:
    k_codec, v_codec = codecs
    return (
        isinstance(k_codec, TurboQuant)
        and isinstance(v_codec, TurboQuant)
        and k_codec.gains == v_codec.gains
        and max(k_codec.dim, v_codec.dim) <= MAX_DIM
        and len(set(dtypes)) == 1
    )


def _encode_side(
    launcher: Launcher,
    x: mx.array,
    means: PageMeans | None,
    first: int,
    basis: ChannelTransform,
    codec: Codec,
) -> TokenArrays:
    if isinstance(codec, Trellis) and codec.dim <= MAX_DIM:
        return _encode_trellis(launcher, x, means, first, basis, codec)
    return reference.encode_side(x, means, first, basis, codec)


def _encode_trellis(
    launcher: Launcher,
    x: mx.array,
    means: PageMeans | None,
    first: int,
    basis: ChannelTransform,
    codec: Trellis,
) -> TokenArrays:
    batch, heads, tokens, dim = x.shape
    inside = rotates(basis.rotation)
    count = 2 * codec.pairs.count
    # Of each search: its steps and half a byte a branch; two buffers of 128 costs.
    vectors = max(1, min(_SEARCHES, _SEARCH_BYTES // (20 * count)))
    simdgroups = max(
        1, min(_SIMDGROUPS, _SEARCH_BYTES // (20 * count * vectors + 1024))
    )
    groups = -(-batch * heads * tokens // (simdgroups * vectors))
    words, scales = launcher(
        ENCODE_TRELLIS,
        [
            x if inside else basis.encode(x).astype(x.dtype),
            signs_of(basis, batch * heads, out=False),
            means.rows if means else zeros(mx.float16),
            _branch_levels(codec),
            sizes_array((tokens, heads, batch, first, means.page if means else 1)),
        ],
        {
            "T": x.dtype,
            "DIM": dim,
            "COUNT": count,
            "VECTORS": vectors,
            "EVEN": codec.widths[0],
            "ODD": codec.widths[-1],
            "ROTATE": inside,
            "CENTER": means is not None,
            "RULE": RULES.index(codec.scale),
            "SIMDGROUPS": simdgroups,
        },
        grid=(32 * simdgroups * groups, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[
            (batch, heads, tokens, codec.pairs.words),
            (batch, heads, tokens, 1),
        ],
        output_dtypes=[mx.uint32, mx.float16],
    )
    return TokenArrays({"words": words, "scales": scales}, tokens)


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
        given = _coefficients(codec.coefficients)
    else:
        given = given_of(codec)
    return launcher(
        DECODE_TOKENS,
        [words, scales, given, sizes_array((tokens, count, batch))],
        {
            "T": dtype,
            "DIM": dim,
            "KIND": format.kind,
            "BITS": format.bits,
            "TERMS": format.terms,
            "THREADS": _DECODE_THREADS,
        },
        grid=(_DECODE_THREADS * -(-threads // _DECODE_THREADS), 1, 1),
        threadgroup=(_DECODE_THREADS, 1, 1),
        output_shapes=[(batch, count, tokens, dim)],
        output_dtypes=[dtype],
    )[0]


@functools.lru_cache(maxsize=64)
def _encode_template(k_codec: TurboQuant, v_codec: TurboQuant) -> dict[str, Any]:
    padded = -(-max(k_codec.dim, v_codec.dim) // 32) * 32
    return {
        "DK": k_codec.dim,
        "DV": v_codec.dim,
        "KB": k_codec.bits,
        "VB": v_codec.bits,
        "K_RULE": RULES.index(k_codec.scale),
        "V_RULE": RULES.index(v_codec.scale),
        "LEVELS": 2 ** max(k_codec.bits, v_codec.bits),
        "CODES": padded * _SIMDGROUPS,
        "GAINS": len(k_codec.gains),
        "SIMDGROUPS": _SIMDGROUPS,
    }


@functools.lru_cache(maxsize=64)
def _tables(k_codec: TurboQuant, v_codec: TurboQuant) -> dict[str, mx.array]:
    """Constant buffers, each padded: fewer than 8 elements would be constant memory."""
    tables = {"inverse_gains": mx.pad(mx.array([1 / g for g in k_codec.gains]), (0, 8))}
    for side, codec in (("k", k_codec), ("v", v_codec)):
        tables[f"{side}_levels"] = mx.pad(codec.book.levels, (0, 8))
        tables[f"{side}_boundaries"] = mx.pad(codec.book.boundaries, (0, 8))
    mx.eval(tables)
    return tables


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

"""Tokens in and out of codes by kernels: encode a page, decode for prefill.

Owns the launches of ``kernels/tokens.py``, each held to a definition in plain mx:
`reference.encode` and the codecs' `decode`.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..codecs import Codec
from ..codecs.kernel_format import EncodeFormat
from ..kernels.kernel import Launcher
from ..kernels.tokens import DECODE_TOKENS, ENCODE_TOKENS, ENCODE_TRELLIS
from ..tokens import TokenArrays
from ..transform import ChannelTransform, PageMeans
from . import reference
from .plan import MAX_DIM, rotates, signs_of, sizes_array, zeros

_SIMDGROUPS = 4
_DECODE_THREADS = 128
#: Vectors that a simdgroup searches for: their ways back go side by side.
_SEARCHES = 2
#: Threadgroup memory that one threadgroup's searches may take, in bytes.
_SEARCH_BYTES = 24 << 10


def refuse(*codecs: Codec) -> str | None:
    """Why the attention and decode kernels cannot take a codec, or None."""
    for codec in codecs:
        if codec.kernel_format is None:
            return f"codec {codec.spec} has no kernel"
        if codec.dim > MAX_DIM:
            return f"head_dim {codec.dim} is over {MAX_DIM}"
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
    k_format, v_format = (codec.encode_format for codec in codecs)
    assert k_format is not None
    assert v_format is not None
    batch, heads, tokens, _ = keys.shape
    tables = _tables(k_format, v_format)
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
            **_encode_template(k_format, v_format, codecs[0].dim, codecs[1].dim),
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
            (*lead, k_format.words),
            (*lead, 1),
            (*lead, v_format.words),
            (*lead, 1),
        ],
        output_dtypes=[mx.uint32, mx.float16, mx.uint32, mx.float16],
    )
    return (
        TokenArrays({"words": k_words, "scales": k_scales}, tokens),
        TokenArrays({"words": v_words, "scales": v_scales}, tokens),
    )


def _in_one_launch(codecs: tuple[Codec, Codec], *dtypes: mx.Dtype) -> bool:
    k_format, v_format = (codec.encode_format for codec in codecs)
    return (
        k_format is not None
        and v_format is not None
        and k_format.kernel == v_format.kernel == "scalar"
        and k_format.template["GAINS"] == v_format.template["GAINS"]
        and max(codec.dim for codec in codecs) <= MAX_DIM
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
    format = codec.encode_format
    if format is not None and format.kernel == "trellis" and codec.dim <= MAX_DIM:
        return _encode_trellis(launcher, x, means, first, basis, format)
    return reference.encode_side(x, means, first, basis, codec)


def _encode_trellis(
    launcher: Launcher,
    x: mx.array,
    means: PageMeans | None,
    first: int,
    basis: ChannelTransform,
    format: EncodeFormat,
) -> TokenArrays:
    batch, heads, tokens, dim = x.shape
    inside = rotates(basis.rotation)
    count = format.template["COUNT"]
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
            format.table,
            sizes_array((tokens, heads, batch, first, means.page if means else 1)),
        ],
        {
            "T": x.dtype,
            "DIM": dim,
            **format.template,
            "VECTORS": vectors,
            "ROTATE": inside,
            "CENTER": means is not None,
            "SIMDGROUPS": simdgroups,
        },
        grid=(32 * simdgroups * groups, 1, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[
            (batch, heads, tokens, format.words),
            (batch, heads, tokens, 1),
        ],
        output_dtypes=[mx.uint32, mx.float16],
    )
    return TokenArrays({"words": words, "scales": scales}, tokens)


def decode(
    launcher: Launcher,
    codec: Codec,
    codes: TokenArrays,
    dtype: mx.Dtype,
    heads: slice,
) -> mx.array:
    """As the codec's `decode`: (B, heads, length, dim), still rotated."""
    words, scales = codes.view("words", heads), codes.view("scales", heads)
    batch, count, tokens, _ = words.shape
    format, dim = codec.kernel_format, codec.dim
    assert format is not None
    threads = batch * count * tokens * -(-dim // 16)
    return launcher(
        DECODE_TOKENS,
        [words, scales, format.exact_params, sizes_array((tokens, count, batch))],
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
def _encode_template(
    k_format: EncodeFormat, v_format: EncodeFormat, k_dim: int, v_dim: int
) -> dict[str, Any]:
    k, v = k_format.template, v_format.template
    return {
        "DK": k_dim,
        "DV": v_dim,
        "KB": k["BITS"],
        "VB": v["BITS"],
        "K_RULE": k["RULE"],
        "V_RULE": v["RULE"],
        "LEVELS": 2 ** max(k["BITS"], v["BITS"]),
        "CODES": -(-max(k_dim, v_dim) // 32) * 32 * _SIMDGROUPS,
        "GAINS": k["GAINS"],
        "SIMDGROUPS": _SIMDGROUPS,
    }


@functools.lru_cache(maxsize=64)
def _tables(k_format: EncodeFormat, v_format: EncodeFormat) -> dict[str, mx.array]:
    """Constant buffers, each padded: fewer than 8 elements would be constant memory."""
    tables = {}
    for side, format in (("k", k_format), ("v", v_format)):
        count = 2 ** format.template["BITS"]
        gains = 2 * count - 1
        tables[f"{side}_levels"] = mx.pad(format.table[:count], (0, 8))
        tables[f"{side}_boundaries"] = mx.pad(format.table[count:gains], (0, 8))
        tables["inverse_gains"] = mx.pad(format.table[gains:], (0, 8))
    mx.eval(tables)
    return tables

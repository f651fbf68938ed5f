"""Tokens in and out of codes by kernels: encode a page, decode for prefill.

Owns the launches of ``kernels/tokens.py``, each held to a definition in plain mx:
`reference.encode` and `TurboQuant.decode`.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..basis import Basis, PageMeans
from ..codecs import Codec
from ..codecs.turboquant import TurboQuant
from ..codes import PackedCodes
from ..kernels.kernel import Launcher
from ..kernels.tokens import DECODE_TOKENS, ENCODE_TOKENS
from ..packing import words_per_vector
from ..polynomial import TERMS, coefficients
from .plan import MAX_DIM, rotates, signs_of, sizes_array

_SIMDGROUPS = 4
_DECODE_THREADS = 128


def refuse(*codecs: Codec) -> str | None:
    """Why the encode and decode kernels cannot take a codec, or None."""
    for codec in codecs:
        if not isinstance(codec, TurboQuant):
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
    bases: tuple[Basis, Basis],
    codecs: tuple[TurboQuant, TurboQuant],
) -> tuple[PackedCodes, PackedCodes]:
    """Both sides of some tokens in one launch; arguments as `reference.encode`'s.

    Keys and values have one dtype and any strides but the last.
    """
    k_codec, v_codec = codecs
    batch, heads, tokens, _ = keys.shape
    tables = _tables(k_codec, v_codec)
    lead = (batch, heads, tokens)
    sides = []
    for x, basis in zip((keys, values), bases, strict=True):
        inside = rotates(basis.rotation)
        sides.append((x if inside else basis.into(x).astype(x.dtype), inside))
    k_words, k_scales, v_words, v_scales = launcher(
        ENCODE_TOKENS,
        [
            sides[0][0],
            sides[1][0],
            signs_of(bases[0], batch * heads, out=False),
            signs_of(bases[1], batch * heads, out=False),
            means.rows if means else tables["no_means"],
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
            "ROTATE_K": sides[0][1],
            "ROTATE_V": sides[1][1],
            "CENTER": means is not None,
        },
        grid=(
            32 * _SIMDGROUPS * -(-batch * heads * tokens // _SIMDGROUPS),
            2,
            1,
        ),
        threadgroup=(32 * _SIMDGROUPS, 1, 1),
        output_shapes=[
            (*lead, words_per_vector(k_codec.spec.bits, k_codec.dim)),
            (*lead, 1),
            (*lead, words_per_vector(v_codec.spec.bits, v_codec.dim)),
            (*lead, 1),
        ],
        output_dtypes=[mx.uint32, mx.float16, mx.uint32, mx.float16],
    )
    return (
        PackedCodes({"words": k_words, "scales": k_scales}, tokens),
        PackedCodes({"words": v_words, "scales": v_scales}, tokens),
    )


def decode(
    launcher: Launcher,
    codec: TurboQuant,
    codes: PackedCodes,
    dtype: mx.Dtype,
    heads: slice,
) -> mx.array:
    """As `TurboQuant.decode`: (B, heads, length, dim), still rotated."""
    words, scales = codes.view("words", heads), codes.view("scales", heads)
    batch, count, tokens, _ = words.shape
    bits, dim = codec.spec.bits, codec.dim
    threads = batch * count * tokens * -(-dim // 16)
    return launcher(
        DECODE_TOKENS,
        [words, scales, _coefficients(dim, bits), sizes_array((tokens, count, batch))],
        {
            "T": dtype,
            "DIM": dim,
            "BITS": bits,
            "TERMS": TERMS[bits],
            "THREADS": _DECODE_THREADS,
        },
        grid=(_DECODE_THREADS * -(-threads // _DECODE_THREADS), 1, 1),
        threadgroup=(_DECODE_THREADS, 1, 1),
        output_shapes=[(batch, count, tokens, dim)],
        output_dtypes=[dtype],
    )[0]


@functools.lru_cache(maxsize=64)
def _encode_template(k_codec: TurboQuant, v_codec: TurboQuant) -> dict[str, Any]:
    bits = (k_codec.spec.bits, v_codec.spec.bits)
    padded = -(-max(k_codec.dim, v_codec.dim) // 32) * 32
    return {
        "DK": k_codec.dim,
        "DV": v_codec.dim,
        "KB": bits[0],
        "VB": bits[1],
        "LEVELS": 2 ** max(bits),
        "CODES": padded * _SIMDGROUPS,
        "GAINS": len(k_codec.gains),
        "SIMDGROUPS": _SIMDGROUPS,
    }


@functools.lru_cache(maxsize=64)
def _tables(k_codec: TurboQuant, v_codec: TurboQuant) -> dict[str, mx.array]:
    """Constant buffers, each padded: fewer than 8 elements would be constant memory."""
    assert k_codec.gains == v_codec.gains
    tables = {
        "no_means": mx.zeros((8,), mx.float16),
        "inverse_gains": mx.pad(mx.array([1 / g for g in k_codec.gains]), (0, 8)),
    }
    for side, codec in (("k", k_codec), ("v", v_codec)):
        tables[f"{side}_levels"] = mx.pad(codec.book.levels, (0, 8))
        tables[f"{side}_boundaries"] = mx.pad(codec.book.boundaries, (0, 8))
    mx.eval(tables)
    return tables


@functools.cache
def _coefficients(dim: int, bits: int) -> mx.array:
    array = mx.array([*coefficients(dim, bits), *[0.0] * 8])
    mx.eval(array)
    return array

"""Tokens in and out of codes by kernels: rotate, encode a page, decode for prefill.

Owns the launches of ``kernels/tokens.py``, each held to a definition in plain mx:
`Rotation.forward`, `TurboQuant.encode` and `TurboQuant.decode`.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from ..codecs import Codec
from ..codecs.turboquant import TurboQuant
from ..codes import PackedCodes
from ..kernels.kernel import Launcher
from ..kernels.tokens import DECODE_TOKENS, ENCODE_TOKENS, ROTATE_TOKENS
from ..packing import words_per_vector
from ..polynomial import TERMS, coefficients
from ..rotation import Rotation
from .plan import MAX_DIM, rotates, sizes_array

_SIMDGROUPS = 4
_DECODE_THREADS = 128


def can_rotate(*rotations: Rotation) -> bool:
    """Whether `rotate` can do all of these."""
    return all(r.dim <= MAX_DIM and (rotates(r) or _plain(r)) for r in rotations)


def rotate(
    launcher: Launcher,
    keys: mx.array,
    values: mx.array,
    rotations: tuple[Rotation, Rotation],
) -> tuple[mx.array, mx.array]:
    """Keys and values (B, H, N, D), any strides, to their bases; dtype kept."""
    batch, heads, tokens, k_dim = keys.shape
    v_dim = values.shape[3]
    template = {
        "T": keys.dtype,
        "DK": k_dim,
        "DV": v_dim,
        "ROTATE_K": not _plain(rotations[0]),
        "ROTATE_V": not _plain(rotations[1]),
        "SIMDGROUPS": _SIMDGROUPS,
    }
    threads = 32 * _SIMDGROUPS
    k_rot, v_rot = launcher(
        ROTATE_TOKENS,
        [
            keys,
            values,
            rotations[0].signs,
            rotations[1].signs,
            sizes_array((tokens, heads, batch)),
        ],
        template,
        grid=(threads * -(-batch * heads * tokens // _SIMDGROUPS), 2, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(batch, heads, tokens, k_dim), (batch, heads, tokens, v_dim)],
        output_dtypes=[keys.dtype, keys.dtype],
    )
    return k_rot, v_rot


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
    keys_rot: mx.array,
    values_rot: mx.array,
    mean: mx.array | None,
    codecs: tuple[TurboQuant, TurboQuant],
) -> tuple[PackedCodes, PackedCodes]:
    """Both sides of some tokens in one launch.

    Args:
        launcher: What runs it.
        keys_rot: (B, H, N, Dk), float, any strides but the last.
        values_rot: (B, H, N, Dv), the same dtype.
        mean: Subtracted from the keys first, (B, H, 1, Dk) float32, or None.
        codecs: Of the keys and of the values, with the same gains.
    """
    k_codec, v_codec = codecs
    batch, heads, tokens, _ = keys_rot.shape
    bits = (k_codec.spec.bits, v_codec.spec.bits)
    tables = _tables(k_codec, v_codec)
    lead = (batch, heads, tokens)
    k_words, k_scales, v_words, v_scales = launcher(
        ENCODE_TOKENS,
        [
            keys_rot,
            values_rot,
            tables["none"] if mean is None else mx.contiguous(mean),
            tables["k_levels"],
            tables["k_boundaries"],
            tables["v_levels"],
            tables["v_boundaries"],
            tables["inverse_gains"],
            sizes_array((tokens, heads, batch)),
        ],
        {
            **_encode_template(k_codec, v_codec),
            "T": keys_rot.dtype,
            "CENTER": mean is not None,
        },
        grid=(
            32 * _SIMDGROUPS * -(-batch * heads * tokens // _SIMDGROUPS),
            2,
            1,
        ),
        threadgroup=(32 * _SIMDGROUPS, 1, 1),
        output_shapes=[
            (*lead, words_per_vector(bits[0], k_codec.dim)),
            (*lead, 1),
            (*lead, words_per_vector(bits[1], v_codec.dim)),
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


def _plain(rotation: Rotation) -> bool:
    return rotation.kind == "identity"


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
        "none": mx.zeros((8,)),
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

"""The bit layout of codes in uint32 words: the definition kernels are held to.

Owns which bit of which word belongs to which element. Knows nothing of levels or
scales.

A vector is cut into chunks of 32 elements. A chunk of b-bit codes is exactly b
words. Each word is two 16-bit halves: even elements live in low halves, odd ones
at the same place in high halves, so one shift and mask yields a pair of codes 16
bits apart. With k = 16 // b codes to a half and r = 16 - k*b bits to spare:

    pair p < k*b   word p // k, bits [b*(p % k), b*(p % k) + b) of each half
    the other      their codes, concatenated low bit first, fill the r spare top
    pairs          bits of the words' halves in word order

For 3 bits a word's half holds codes p, p+1, ... p+4 and one spare bit; the spare
bits of the three words are the 16th pair. A ragged last chunk of n elements has
ceil(n / 2) pairs in ceil(pairs * b / 16) words; absent elements are code 0.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

CHUNK = 32
_HALF = 16


class _Chunks(NamedTuple):
    """``chunks`` equal chunks, each of so many elements, pairs and words."""

    chunks: int
    elements: int
    pairs: int
    words: int


def _runs(bits: int, dim: int) -> list[_Chunks]:
    full, rest = divmod(dim, CHUNK)
    runs = [_Chunks(full, CHUNK, CHUNK // 2, bits)] if full else []
    if rest:
        pairs = (rest + 1) // 2
        runs.append(_Chunks(1, rest, pairs, -(-pairs * bits // _HALF)))
    return runs


def words_per_vector(bits: int, dim: int) -> int:
    """Number of uint32 words that hold ``dim`` codes of ``bits`` bits each."""
    return sum(run.chunks * run.words for run in _runs(bits, dim))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., dim), any integer dtype, values < 2**bits, to words.

    Returns:
        uint32 (..., words_per_vector(bits, dim)).

    >>> pack(mx.array([1, 2, 3, 0]), 4).tolist()  # 0x00020001 | 0x00000030
    [131121]
    """
    lead, dim = codes.shape[:-1], codes.shape[-1]
    codes = codes.astype(mx.uint32)
    words, start = [], 0
    for run in _runs(bits, dim):
        stop = start + run.chunks * run.elements
        chunk = codes[..., start:stop].reshape(*lead, run.chunks, run.elements)
        if run.elements < 2 * run.pairs:
            chunk = mx.pad(chunk, [(0, 0)] * (chunk.ndim - 1) + [(0, 1)])
        pairs = chunk.reshape(*lead, run.chunks, run.pairs, 2)
        words.append(_pack_chunks(pairs, bits, run.words).reshape(*lead, -1))
        start = stop
    return mx.concatenate(words, axis=-1) if len(words) > 1 else words[0]


def unpack(words: mx.array, bits: int, dim: int) -> mx.array:
    """The inverse of `pack`: words (..., W) uint32 to codes (..., dim) uint32."""
    lead = words.shape[:-1]
    codes, start = [], 0
    for run in _runs(bits, dim):
        stop = start + run.chunks * run.words
        chunk = words[..., start:stop].reshape(*lead, run.chunks, run.words)
        pairs = _unpack_chunks(chunk, bits, run.pairs)
        flat = pairs.reshape(*lead, run.chunks, 2 * run.pairs)
        if run.elements < 2 * run.pairs:
            flat = flat[..., : run.elements]
        codes.append(flat.reshape(*lead, -1))
        start = stop
    return mx.concatenate(codes, axis=-1) if len(codes) > 1 else codes[0]


def _shifts(count: int, step: int) -> mx.array:
    return (mx.arange(count, dtype=mx.uint32) * step)[:, None]


def _pack_chunks(pairs: mx.array, bits: int, words: int) -> mx.array:
    """Pairs (..., P, 2) of codes to (..., words)."""
    per_half = _HALF // bits
    spare = _HALF - per_half * bits
    direct = pairs[..., : per_half * words, :]
    missing = per_half * words - direct.shape[-2]
    if missing:
        direct = mx.pad(direct, [(0, 0)] * (direct.ndim - 2) + [(0, missing), (0, 0)])
    direct = direct.reshape(*direct.shape[:-2], words, per_half, 2)
    halves = mx.sum(direct << _shifts(per_half, bits), axis=-2)
    late = pairs[..., per_half * words :, :]
    if late.shape[-2]:
        stream = mx.sum(late << _shifts(late.shape[-2], bits), axis=-2, keepdims=True)
        field = (stream >> _shifts(words, spare)) & ((1 << spare) - 1)
        halves = halves | (field << (_HALF - spare))
    return halves[..., 0] | (halves[..., 1] << _HALF)


def _unpack_chunks(words: mx.array, bits: int, pairs: int) -> mx.array:
    """Words (..., W) of chunks to pairs (..., pairs, 2) of codes."""
    count = words.shape[-1]
    per_half = _HALF // bits
    spare = _HALF - per_half * bits
    mask = (1 << bits) - 1
    halves = mx.stack([words & 0xFFFF, words >> _HALF], axis=-1)
    direct = (halves[..., None, :] >> _shifts(per_half, bits)) & mask
    codes = direct.reshape(*words.shape[:-1], count * per_half, 2)
    late = pairs - count * per_half
    if late <= 0:
        return codes[..., :pairs, :]
    field = halves >> (_HALF - spare)
    stream = mx.sum(field << _shifts(count, spare), axis=-2, keepdims=True)
    return mx.concatenate([codes, (stream >> _shifts(late, bits)) & mask], axis=-2)

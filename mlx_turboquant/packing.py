"""The bit layout of codes in uint32 words: the definition kernels are held to.

A word is two 16-bit halves. Even elements live in low halves, odd ones at the same
place in high halves, so one shift and mask yields a pair of codes 16 bits apart,
ready to become a half2. Sixteen elements, 8 pairs, are a *group*: what one GPU lane
decodes. A group of b-bit codes has b // 2 words of its own, and for odd b also an
8-bit field in each half of a word it shares with its neighbour. Two groups, 32
elements, are a *chunk* of exactly b words:

    own words of group 0 | own words of group 1 | shared word (odd b)

where group g's field in the shared word is bits [8g, 8g + 8) of each half. Within
a group, pairs fill the fields in order, as many as fit whole into each (16 // b in
an own half, 8 // b in a shared field), low bits first. The spare bits above them,
in field order, low bits first, are the remaining pairs. A chunk of 3 bits, one half
of each word (the other half holds the other elements of the pairs):

    bit                  15 | 14   12 | 11    9 | 8     6 | 5     3 | 2     0
    own word, group 0    s0 | pair 4  | pair 3  | pair 2  | pair 1  | pair 0
    own word, group 1    s0 | pair 4  | pair 3  | pair 2  | pair 1  | pair 0

    bit                  15 14 | 13  11 | 10   8 | 7   6 | 5    3 | 2    0
    shared word          s2 s1 | pair 6 | pair 5 | s2 s1 | pair 6 | pair 5
                         of group 1              | of group 0

where s0, s1, s2 of a group, low bits first, are its pair 7. A dim that is no multiple
of 16 is padded with code 0; an odd number of groups ends in own words and a shared
word used by one group only.
"""

from __future__ import annotations

import mlx.core as mx

GROUP = 16
_PAIRS = GROUP // 2
_HALF = 16


def words_per_vector(bits: int, dim: int) -> int:
    """Number of uint32 words that hold ``dim`` codes of ``bits`` bits each."""
    chunks, single_groups = divmod(-(-dim // GROUP), 2)
    return chunks * bits + single_groups * ((bits + 1) // 2)


def _fields(bits: int) -> list[tuple[int, int]]:
    """How many pairs fit into each field of a group, and how many bits are spare."""
    widths = [_HALF] * (bits // 2) + [_HALF // 2] * (bits % 2)
    return [(width // bits, width % bits) for width in widths]


def _shifts(count: int, step: int) -> mx.array:
    return (mx.arange(count, dtype=mx.uint32) * step)[:, None]


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., dim), any integer dtype, values < 2**bits, to words.

    Returns:
        uint32 (..., words_per_vector(bits, dim)).

    >>> pack(mx.array([1, 2, 3, 0]), 4).tolist()  # 0x00020001 | 0x00000030, 0
    [131121, 0]
    """
    lead, dim = codes.shape[:-1], codes.shape[-1]
    codes = codes.astype(mx.uint32)
    if dim % GROUP:
        codes = mx.pad(codes, [(0, 0)] * len(lead) + [(0, -dim % GROUP)])
    fields = _pack_fields(codes.reshape(*lead, -1, _PAIRS, 2), bits)
    groups = fields[0].shape[-2]
    in_chunks = groups // 2 * 2
    parts = []
    if in_chunks:
        parts.append(_pack_chunks([f[..., :in_chunks, :] for f in fields], bits, 2))
    if groups % 2:
        parts.append(_pack_chunks([f[..., in_chunks:, :] for f in fields], bits, 1))
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def unpack(words: mx.array, bits: int, dim: int) -> mx.array:
    """The inverse of `pack`: words (..., W) uint32 to codes (..., dim) uint8."""
    lead = words.shape[:-1]
    chunks, single_groups = divmod(-(-dim // GROUP), 2)
    halves = mx.stack([words & 0xFFFF, words >> _HALF], axis=-1)
    parts = []
    if chunks:
        by_chunk = halves[..., : chunks * bits, :].reshape(*lead, chunks, bits, 2)
        parts.append(_unpack_chunks(by_chunk, bits, 2).reshape(*lead, -1))
    if single_groups:
        last = halves[..., None, chunks * bits :, :]
        parts.append(_unpack_chunks(last, bits, 1).reshape(*lead, -1))
    codes = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    return codes[..., :dim]


def _pack_fields(pairs: mx.array, bits: int) -> list[mx.array]:
    """Groups (..., 8, 2) of codes to the fields (..., 2) of each."""
    shape = _fields(bits)
    remaining = pairs[..., sum(count for count, _ in shape) :, :]
    spare_bits = mx.sum(remaining << _shifts(remaining.shape[-2], bits), axis=-2)
    fields, first, taken = [], 0, 0
    for count, spare in shape:
        fitting = pairs[..., first : first + count, :]
        field = mx.sum(fitting << _shifts(count, bits), axis=-2)
        extra = (spare_bits >> taken) & ((1 << spare) - 1)
        fields.append(field | (extra << (count * bits)))
        first, taken = first + count, taken + spare
    return fields


def _pack_chunks(fields: list[mx.array], bits: int, width: int) -> mx.array:
    """Fields (..., groups, 2) of chunks of ``width`` groups to words (..., W)."""
    lead = fields[0].shape[:-2]
    by_chunk = [field.reshape(*lead, -1, width, 2) for field in fields]
    words = [f[..., g, :] for g in range(width) for f in by_chunk[: bits // 2]]
    if bits % 2:
        shared = by_chunk[-1][..., 0, :]
        if width == 2:
            shared = shared | (by_chunk[-1][..., 1, :] << _HALF // 2)
        words.append(shared)
    halves = mx.stack(words, axis=-2)
    return (halves[..., 0] | (halves[..., 1] << _HALF)).reshape(*lead, -1)


def _unpack_chunks(halves: mx.array, bits: int, width: int) -> mx.array:
    """Halves (..., words, 2) of chunks of ``width`` groups to (..., width, 8, 2)."""
    own = bits // 2
    mask = (1 << bits) - 1
    groups = []
    for g in range(width):
        fields = [halves[..., g * own + i, :] for i in range(own)]
        if bits % 2:
            shared = halves[..., width * own, :]
            fields.append((shared >> (g * _HALF // 2)) & 0xFF)
        pairs, taken = [], 0
        spare_bits = mx.zeros_like(halves[..., 0, :])
        for field, (count, spare) in zip(fields, _fields(bits), strict=True):
            fitting = (field[..., None, :] >> _shifts(count, bits)) & mask
            pairs.append(fitting.astype(mx.uint8))
            spare_bits = spare_bits | ((field >> (count * bits)) << taken)
            taken += spare
        if taken:
            shifts = _shifts(taken // bits, bits)
            remaining = (spare_bits[..., None, :] >> shifts) & mask
            pairs.append(remaining.astype(mx.uint8))
        groups.append(mx.concatenate(pairs, axis=-2))
    return mx.stack(groups, axis=-3)

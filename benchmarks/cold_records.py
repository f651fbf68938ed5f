"""`freeze` and `restore`: codes of some tokens as fewer bytes, and back, exactly.

A record is a header, the codes of all layers under a range asymmetric numeral system
(``constriction``), and the scales, their bytes apart, deflated. It can be restored by
the `CodePredictor` that froze it and no other, and is checked against a checksum of
what was frozen.

Records of a text are restored together: coordinate by coordinate, all tokens at once.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from cold_prediction import (
    CodeArray,
    CodePredictor,
    Floats,
    LayerCodes,
    Rule,
    Vector,
    buckets,
    codes_of,
    levels_of,
)

from mlx_turboquant.errors import FormatError, UnsupportedError
from mlx_turboquant.packing import pack
from mlx_turboquant.quantizer import Sides
from mlx_turboquant.tiles import in_vectors
from mlx_turboquant.tokens import TokenArrays

_MAGIC = b"tqc1"
#: Magic, predictor, tokens, bytes of codes, bytes of scales, checksum.
_HEADER = struct.Struct("<4s8sIIII")
#: Elements whose sums are begun together, by one product of matrices.
_BLOCK = 16


def freeze(predictor: CodePredictor, layers: Sequence[LayerCodes]) -> bytes:
    """Codes of some tokens as a record.

    Args:
        predictor: Fitted to the same model and codecs.
        layers: Each layer's codes (1, H, T, .), in either order, equally many tokens.

    Raises:
        UnsupportedError: if ``constriction`` is not installed.
    """
    coding = _constriction()
    codes, parts = {}, []
    for layer, sides in enumerate(layers):
        for side, held in sides.items():
            own = codes_of(held, getattr(predictor.codecs[layer], side))
            for head, rows in enumerate(own):
                codes[Vector(side, layer, head)] = np.ascontiguousarray(rows.T)
            parts.append(_bytes(in_vectors(held).view("scales")))
    levels = {v: levels_of(predictor.codec(v))[rows] for v, rows in codes.items()}
    coder = coding.stack.AnsCoder()
    family = coding.model.Categorical(lazy=True)
    # A stack: what is decoded first is encoded last.
    for vector in reversed(predictor.order):
        rule, table = _rule(predictor, vector)
        predicted = _from_sources(rule, levels) + rule.inner @ levels[vector]
        rows = buckets(predicted)
        probabilities = table[rule.classes[:, None], rows].reshape(-1, table.shape[2])
        symbols = codes[vector].reshape(-1).astype(np.int32)
        coder.encode_reverse(symbols, family, probabilities)
    stream = np.asarray(coder.get_compressed(), np.dtype("<u4")).tobytes()
    plain = b"".join(parts)
    scales = zlib.compress(_apart(plain), 6)
    tokens = next(iter(codes.values())).shape[1]
    check = _checksum([codes[v] for v in predictor.order], plain)
    sizes = tokens, len(stream), len(scales), check
    return _HEADER.pack(_MAGIC, predictor.digest, *sizes) + stream + scales


def restore(
    predictor: CodePredictor, records: Sequence[bytes | memoryview]
) -> list[Sides[TokenArrays]]:
    """Each layer's codes (1, H, T, .) in vector order: the records', in turn.

    Args:
        predictor: The one that froze them.
        records: What `freeze` returned.

    Raises:
        FormatError: for a record that is damaged or another predictor's.
        UnsupportedError: if ``constriction`` is not installed.
    """
    coding = _constriction()
    opened = [_open(predictor, record) for record in records]
    counts = [tokens for tokens, *_ in opened]
    family = coding.model.Categorical(lazy=True)
    coders = [coding.stack.AnsCoder(stream) for _, stream, _, _ in opened]
    ends = np.cumsum(counts).tolist()
    spans = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
    codes: dict[Vector, CodeArray] = {}
    levels: dict[Vector, Floats] = {}
    for vector in predictor.order:
        rule, table = _rule(predictor, vector)
        of_codes = levels_of(predictor.codec(vector))
        predicted = _from_sources(rule, levels, ends[-1])
        own = np.empty_like(predicted)
        rows = np.empty(predicted.shape, np.uint8)
        for i in range(len(own)):
            start = i - i % _BLOCK
            if i == start:
                block = slice(start, start + _BLOCK)
                predicted[block] += rule.inner[block, :start] @ own[:start]
            sums = predicted[i] + rule.inner[i, start:i] @ own[start:i]
            likely = np.take(table[rule.classes[i]], buckets(sums), axis=0)
            for coder, span in zip(coders, spans, strict=True):
                rows[i, span] = coder.decode(family, likely[span])
            own[i] = of_codes[rows[i]]
        codes[vector], levels[vector] = rows, own
    for (_, _, plain, check), span in zip(opened, spans, strict=True):
        held = [codes[v][:, span] for v in predictor.order]
        if _checksum(held, plain) != check:
            raise FormatError("a frozen page is not what was frozen; read it again")
    return _packed(predictor, codes, [plain for _, _, plain, _ in opened], counts)


def _packed(
    predictor: CodePredictor,
    codes: dict[Vector, CodeArray],
    plain: Sequence[bytes],
    counts: Sequence[int],
) -> list[Sides[TokenArrays]]:
    layers, at = [], [0] * len(plain)
    for layer, heads in enumerate(predictor.heads):
        made = []
        for side, count in heads.items():
            codec = getattr(predictor.codecs[layer], side)
            rows = [codes[Vector(side, layer, head)].T for head in range(count)]
            words = pack(mx.array(np.stack(rows))[None], codec.bits)
            scales = []
            for i, tokens in enumerate(counts):
                own = np.frombuffer(plain[i], np.float16, count * tokens, at[i])
                scales.append(own.reshape(1, count, tokens, 1))
                at[i] += own.nbytes
            joined = mx.array(np.concatenate(scales, axis=2))
            made.append(TokenArrays({"words": words, "scales": joined}))
        layers.append(Sides(*made))
    return layers


def _open(
    predictor: CodePredictor, record: bytes | memoryview
) -> tuple[int, npt.NDArray[np.uint32], bytes, int]:
    """Tokens, codes' stream, scales and checksum of a record."""
    if len(record) < _HEADER.size or bytes(record[:4]) != _MAGIC:
        raise FormatError("this is not a frozen page")
    _, digest, tokens, size, rest, check = _HEADER.unpack_from(record)
    if digest != predictor.digest:
        raise FormatError(
            f"a page was frozen by predictor {digest.hex()}, not by "
            f"{predictor.digest.hex()}; restore it with that one"
        )
    if len(record) != _HEADER.size + size + rest or size % 4:
        raise FormatError(
            f"a frozen page has {len(record)} bytes, not {_HEADER.size + size + rest}"
        )
    stream = np.frombuffer(record, np.dtype("<u4"), size // 4, _HEADER.size)
    try:
        plain = _together(zlib.decompress(bytes(record[_HEADER.size + size :])))
    except zlib.error as error:
        raise FormatError(f"a frozen page's scales are damaged: {error}") from error
    wanted = 2 * tokens * sum(n for heads in predictor.heads for n in heads)
    if len(plain) != wanted:
        raise FormatError(
            f"a frozen page has {len(plain)} bytes of scales, not {wanted}"
        )
    return tokens, stream.astype(np.uint32), plain, check


def _rule(predictor: CodePredictor, vector: Vector) -> tuple[Rule, Floats]:
    return predictor.rule(vector), predictor.table(predictor.codec(vector).bits)


def _from_sources(
    rule: Rule, levels: dict[Vector, Floats], tokens: int | None = None
) -> Floats:
    """What other vectors say of one (D, T), whole numbers."""
    if not rule.sources:
        count = next(iter(levels.values())).shape[1] if tokens is None else tokens
        return np.zeros((len(rule.inner), count), np.float32)
    said: Floats = rule.outer @ np.concatenate([levels[v] for v in rule.sources])
    return said


def _checksum(codes: Sequence[CodeArray], plain: bytes) -> int:
    check = zlib.crc32(plain)
    for rows in codes:
        check = zlib.crc32(np.ascontiguousarray(rows).data, check)
    return check


def _bytes(array: mx.array) -> bytes:
    return np.ascontiguousarray(np.array(array)).tobytes()


def _apart(plain: bytes) -> bytes:
    """Low bytes of fp16 numbers, then high bytes, which are alike."""
    return np.frombuffer(plain, np.uint8).reshape(-1, 2).T.tobytes()


def _together(apart: bytes) -> bytes:
    """The inverse of `_apart`."""
    return np.frombuffer(apart, np.uint8).reshape(2, -1).T.tobytes()


def _constriction() -> Any:
    try:
        from constriction import stream
    except ImportError as error:
        raise UnsupportedError(
            "freezing pages needs constriction, which is not installed",
            "pip install constriction",
        ) from error
    return stream

"""`CodePredictor`: what one code says of the next, learned from a model's own pages.

Codes of one vector are nearly independent of their own channel's past, but not of each
other: heads and neighbouring layers see one residual stream. A code's level is
predicted by a linear map of the levels before it in its own vector and of the same
token's vectors in `sources`: the Cholesky factor of their covariance, so that what is
left over is decorrelated. How sure the prediction is belongs to the coordinate.

What it says must be the same wherever a page is restored, to the last bit. So levels
are multiples of 1/16, weights of 1/128, and every sum of products a whole number that
float32 holds exactly, in whatever order it is added.

Owns the prediction and the probabilities; coding by them is `cold_records`'. An
experiment: the disk tier keeps pages as they are (docs/codecs.md says why).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_turboquant.codecs import Codec
from mlx_turboquant.codecs.base import Side
from mlx_turboquant.codecs.scaled import ScalarCodec
from mlx_turboquant.errors import FormatError, UnsupportedError
from mlx_turboquant.packing import unpack
from mlx_turboquant.quantizer import Sides
from mlx_turboquant.tiles import in_vectors
from mlx_turboquant.tokens import Codes

Floats = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]
#: One layer's codes of some tokens.
LayerCodes = Sides[Codes]

#: Codes of more bits have tables that are slow to look up, and little to gain.
MAX_BITS = 5
#: Heads of a layer that a vector is predicted from, the nearest.
NEAR = 2
_LEVEL, _WEIGHT = 16, 128
#: Predicted levels: multiples of 1 / _BUCKET up to _FURTHEST either way.
_BUCKET, _FURTHEST = 16, 40
#: Deviations of what is left over: 2^(k / 4), k from _FINEST to 0 and one more.
_FINEST, _CLASSES = -12, 14
#: Whole numbers that float32 holds.
_EXACT = 2**24
#: Of a level's variance, added to it: texts differ.
_RIDGE = 2e-3
#: Of all probability, shared alike by all codes: what was never seen has a code.
_UNSEEN = 5e-3


class Vector(NamedTuple):
    """Vectors of one head, of all tokens."""

    side: Side
    layer: int
    head: int


@dataclass(frozen=True, eq=False)
class Rule:
    """How the codes of one head are predicted.

    Attributes:
        sources: Vectors that come first.
        outer: Weights (D, elements of sources) float32, whole numbers.
        inner: Weights (D, D) float32 of elements before, whole numbers.
        classes: (D,) which deviation is left over.
    """

    sources: tuple[Vector, ...]
    outer: Floats
    inner: Floats
    classes: npt.NDArray[np.int64]


def sources(vector: Vector, heads: Sequence[Sides[int]]) -> tuple[Vector, ...]:
    """What a vector is predicted from, all decoded before it.

    Up to `NEAR` heads each: before it in its own layer and side, in the layer before,
    and of the same layer's keys if it is one of values.

    Args:
        vector: The vector.
        heads: KV heads of each layer.
    """
    side, layer, head = vector
    found = [Vector(side, layer, h) for h in range(max(0, head - NEAR), head)]
    if layer:
        found += _nearest(side, layer - 1, head, getattr(heads[layer - 1], side))
    if side == "values":
        found += _nearest("keys", layer, head, heads[layer].keys)
    return tuple(found)


def _nearest(side: Side, layer: int, head: int, count: int) -> list[Vector]:
    near = sorted(range(count), key=lambda other: (abs(other - head), other))[:NEAR]
    return [Vector(side, layer, other) for other in sorted(near)]


class CodePredictor:
    """Probabilities of codes, given those before them.

    Args:
        codecs: Of each layer.
        heads: KV heads of each layer.
        arrays: What was learned; see `fit`.

    Attributes:
        codecs, heads: As above.
        arrays: To keep beside the pages, by name: weights int8, classes uint8, tables
            float32. With the same arguments they make the same predictor again.
        order: Every layer's vectors, each behind its sources.
        digest: Names it: what it froze, no other can restore.

    Raises:
        FormatError: if the arrays are not of such a model.
        UnsupportedError: for a codec whose codes are not of elements, or are of more
            than `MAX_BITS` bits.
    """

    def __init__(
        self,
        codecs: Sequence[Sides[Codec]],
        heads: Sequence[Sides[int]],
        arrays: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self.codecs, self.heads = scalar_codecs(codecs), list(heads)
        self.order = decoding_order(heads)
        self.arrays = dict(arrays)
        self._rules: dict[Vector, Rule] = {}
        lineage = hashlib.blake2b(digest_size=8)
        for name in sorted(arrays):
            lineage.update(f"{name} {arrays[name].shape}".encode())
            lineage.update(np.ascontiguousarray(arrays[name]).data)
        self.digest = lineage.digest()
        for vector in self.order:
            self._rules[vector] = self._read_rule(vector)

    def _read_rule(self, vector: Vector) -> Rule:
        dim = self.codec(vector).dim
        first = sources(vector, self.heads)
        width = sum(self.codec(source).dim for source in first)
        name = _name(vector)
        try:
            weights = self.arrays[f"{name}:weights"]
            classes = self.arrays[f"{name}:classes"]
            self.table(self.codec(vector).bits)
        except KeyError as error:
            raise FormatError(f"the predictor has no {error}; fit it again") from error
        if weights.shape != (dim, width + dim) or classes.shape != (dim,):
            raise FormatError(
                f"the predictor's {name} is {weights.shape}, not {(dim, width + dim)}; "
                "it is another model's: fit it again"
            )
        wide = weights.astype(np.float32)
        largest = np.abs(wide).sum(axis=1).max() * levels_of(self.codec(vector)).max()
        if largest >= _EXACT:
            raise UnsupportedError(
                f"sums of {name} may be {largest:g}, and float32 counts to {_EXACT}",
                "keep pages of this model as they are",
            )
        inner = np.tril(wide[:, width:], -1)
        outer = np.ascontiguousarray(wide[:, :width])
        return Rule(first, outer, inner, classes.astype(np.int64))

    def codec(self, vector: Vector) -> ScalarCodec:
        """The codec of a vector's codes."""
        codec: ScalarCodec = getattr(self.codecs[vector.layer], vector.side)
        return codec

    def rule(self, vector: Vector) -> Rule:
        """How a vector's codes are predicted."""
        return self._rules[vector]

    def table(self, bits: int) -> Floats:
        """Probabilities (classes, buckets, 2**bits) of codes of so many bits."""
        table: Floats = self.arrays[f"table:{bits}"]
        return table

    @classmethod
    def fit(
        cls, codecs: Sequence[Sides[Codec]], texts: Sequence[Sequence[LayerCodes]]
    ) -> CodePredictor:
        """Learn from codes of a model's own texts.

        Args:
            codecs: Of each layer.
            texts: Each text's layers, codes (1, H, T, .). Some 4,000 tokens are
                enough, 12,000 better.

        Raises:
            UnsupportedError: for a codec whose codes are not of elements, or are of
                more than `MAX_BITS` bits.
        """
        scalars = scalar_codecs(codecs)
        heads = [
            Sides(*(codes.view("words").shape[1] for codes in layer))
            for layer in texts[0]
        ]
        levels = {
            vector: np.concatenate(
                [
                    _levels_of(
                        getattr(text[vector.layer], vector.side), scalars, vector
                    )
                    for text in texts
                ]
            )
            for vector in decoding_order(heads)
        }
        arrays: dict[str, npt.NDArray[Any]] = {}
        for vector, own in levels.items():
            first = [levels[source] for source in sources(vector, heads)]
            weights, classes = _regress(np.concatenate([*first, own], axis=1), own)
            arrays[f"{_name(vector)}:weights"] = weights
            arrays[f"{_name(vector)}:classes"] = classes
            codec: ScalarCodec = getattr(scalars[vector.layer], vector.side)
            arrays.setdefault(f"table:{codec.bits}", _table(codec))
        return cls(codecs, heads, arrays)


def scalar_codecs(codecs: Sequence[Sides[Codec]]) -> list[Sides[ScalarCodec]]:
    """The same codecs, if their codes can be predicted.

    Raises:
        UnsupportedError: naming one whose codes cannot.
    """
    for sides in codecs:
        for codec in sides:
            if not isinstance(codec, ScalarCodec) or codec.bits > MAX_BITS:
                raise UnsupportedError(
                    f"codes of {codec.spec} cannot be frozen: it takes a code for each "
                    f"element, of at most {MAX_BITS} bits",
                    "keep its pages as they are",
                )
    return [Sides(*sides) for sides in codecs]  # type: ignore[arg-type]


def decoding_order(heads: Sequence[Sides[int]]) -> list[Vector]:
    """All vectors of a token, each behind its `sources`."""
    return [
        Vector(side, layer, head)
        for layer, counts in enumerate(heads)
        for side, count in counts.items()
        for head in range(count)
    ]


def codes_of(codes: Codes, codec: ScalarCodec) -> CodeArray:
    """Codes (H, T, D) of one side of one sequence."""
    words = in_vectors(codes).view("words")[0]
    return np.array(unpack(words, codec.bits, codec.dim).astype(mx.uint8))


def levels_of(codec: ScalarCodec) -> Floats:
    """Its levels (2**bits,) in sixteenths, whole numbers."""
    levels = np.array(codec.levels(mx.arange(2**codec.bits)))
    rounded: Floats = np.rint(levels * _LEVEL).astype(np.float32)
    return rounded


def buckets(predicted: Floats) -> npt.NDArray[np.int64]:
    """Rows of a table for predictions, whole numbers of 1 / 2048."""
    nearest = np.rint(predicted * np.float32(_BUCKET / (_LEVEL * _WEIGHT)))
    rows = np.clip(nearest, -_FURTHEST, _FURTHEST) + _FURTHEST
    return np.asarray(rows, np.int64)


def _name(vector: Vector) -> str:
    return f"{vector.side}.{vector.layer}.{vector.head}"


def _levels_of(
    codes: Codes, codecs: Sequence[Sides[ScalarCodec]], vector: Vector
) -> Floats:
    codec: ScalarCodec = getattr(codecs[vector.layer], vector.side)
    one: Floats = levels_of(codec)[codes_of(codes, codec)[vector.head]]
    return one


def _regress(
    both: Floats, own: Floats
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8]]:
    """Weights (D, F) and classes (D,) of the last D of F columns, given those before.

    With L the Cholesky factor of the covariance, L^-1 x is white, and column i is what
    the columns before say of it plus L_ii of that.
    """
    dim, count = own.shape[1], len(both)
    covariance = (both.T @ both).astype(np.float64) / count
    covariance += np.diag(np.diag(covariance) * _RIDGE + 1e-6)
    factor = np.linalg.cholesky(covariance)
    scale = np.diag(factor)[-dim:]
    weights = -scale[:, None] * np.linalg.inv(factor)[-dim:]
    weights = np.tril(weights, both.shape[1] - dim - 1)
    whole = np.clip(np.rint(weights * _WEIGHT), -127, 127).astype(np.int8)
    steps = np.rint(4 * np.log2(scale / _LEVEL)) - _FINEST
    return whole, np.clip(steps, 0, _CLASSES - 1).astype(np.uint8)


def _table(codec: ScalarCodec) -> Floats:
    """Probabilities (classes, buckets, codes) of a Gaussian around each prediction."""
    levels = levels_of(codec).astype(np.float64) / _LEVEL
    inner = (levels[1:] + levels[:-1]) / 2
    table = np.empty((_CLASSES, 2 * _FURTHEST + 1, len(levels)))
    for row in range(_CLASSES):
        deviation = 2 ** ((row + _FINEST) / 4)
        for bucket in range(2 * _FURTHEST + 1):
            mean = (bucket - _FURTHEST) / _BUCKET
            below = [
                0.5 * math.erfc((mean - edge) / deviation / math.sqrt(2))
                for edge in inner
            ]
            table[row, bucket] = np.diff([0.0, *below, 1.0])
    shared: Floats = ((1 - _UNSEEN) * table + _UNSEEN / len(levels)).astype(np.float32)
    return shared

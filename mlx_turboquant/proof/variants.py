"""Which launches of decode attention a tuner tries, for what a cache holds.

Owns their numbers and order; which of them is best is `tuner`'s to find.
"""

from __future__ import annotations

from ..backends import specialize
from ..quantizer import Quantizer
from .tuner import Axis

#: Units of values that a simdgroup adds up at most: it has 4 to 8 sums a lane for each,
#: and twice that where a threadgroup takes two tiles of rows.
_MOST_OWN_UNITS = 4
#: From this head_dim on threadgroups have one tile of rows, and memory for more
#: simdgroups.
_WIDE_DIM = 257


def axes(values: Quantizer, rows: int, dialect: str) -> list[Axis]:
    """What to try; what is there untuned is not among it.

    First what needs no other kernel: compiling one may take a quarter of the time.

    Args:
        values: The values' quantizer.
        rows: Query rows of a KV head.
        dialect: The launcher's name.
    """
    untuned = specialize.split_simdgroups(values)
    units = specialize.units_of(values)
    most = 8 if values.codec.dim >= _WIDE_DIM else 4
    teams = [
        n
        for n in (1, 2, 4, 8)
        if n <= min(most, units) and n != untuned and units <= _MOST_OWN_UNITS * n
    ]
    return [
        ("few_tokens", (128, 512)),
        ("many_tokens", (512, 2048)),
        ("fill", (0.5, 0.75, 1.5, 2.0)),
        ("simdgroups", teams),
        ("fma_rows", _fma_rows(values, rows, dialect)),
        ("merge_simdgroups", (4, 16)),
    ]


def _fma_rows(values: Quantizer, rows: int, dialect: str) -> list[int]:
    """The other form for so many rows; others keep theirs, unless it follows.

    Multiply-adds take longer the more rows there are, matrix products do not: where
    the former win, they win for fewer rows too.
    """
    if specialize.fma_rows(values, rows, dialect):
        return [rows - 1]
    takes = specialize.fma_rows(values, rows, dialect, specialize.MOST_FMA)
    return [rows] if takes else []

"""Right or wrong: a backend's results beside the truth, and beside its own.

The truth is the reference's, on the CPU, whatever device is under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..backends.reference import Reference
from ..backends.truth import TOLERANCE, TRUTH

#: Share of vectors for which codes may be another choice, and how much farther from a
#: vector such a choice may be.
_MOST_TIES, _AS_GOOD = 0.1, 1.02

Work = Callable[[Reference], Sequence[mx.array]]


class WrongError(Exception):
    """A kernel's result is not what it must be; says how."""


def truth_of(work: Work) -> Sequence[mx.array]:
    """What the reference makes of it, on the CPU."""
    with mx.stream(mx.cpu):
        want = work(TRUTH)
        mx.eval(want)
    return want


def hold(
    backend: Reference,
    work: Work,
    want: Sequence[mx.array],
    tolerance: float = TOLERANCE,
    row_tolerance: float | None = None,
    times: int = 2,
) -> float:
    """Relative error of a backend's work.

    Args:
        backend: Who does it.
        work: What to do.
        want: What must come of it.
        tolerance: Bound on the error of each result.
        row_tolerance: Bound on that of each vector; None for none.
        times: How often it is done.

    Raises:
        WrongError: if it is not near, or not always the same.
    """
    first = list(work(backend))
    mx.eval(first)
    worst = 0.0
    for got, true in zip(first, want, strict=True):
        error, of_row = _errors(got, true)
        if not error < tolerance:  # NaN is not
            raise WrongError(f"error {error:.2g} is over {tolerance:g}")
        if row_tolerance is not None and not of_row < row_tolerance:
            raise WrongError(f"error {of_row:.2g} of a row is over {row_tolerance:g}")
        worst = max(worst, error)
    for turn in range(1, times):
        again = list(work(backend))
        mx.eval(again)
        with mx.stream(mx.cpu):
            pairs = zip(first, again, strict=True)
            if not all(mx.array_equal(a, b).item() for a, b in pairs):
                raise WrongError(f"run {turn + 1} of the same differs from the first")
    return worst


def without_ties(got: mx.array, want: mx.array, x_rot: mx.array) -> mx.array:
    """``got``, but ``want`` where another choice of codes is as good.

    Two codewords can be as near to a vector as float32 can tell. At 3 bits that was
    seen once in thousands of vectors, at 8 bits, where they are close, in 7 of 100.

    Args:
        got: What a backend's codes decode to (B, H, N, D).
        want: What the truth's do.
        x_rot: What was encoded.
    """
    with mx.stream(mx.cpu):
        arrays = (a.astype(mx.float32) for a in (got, want, x_rot))
        a, b, x = (np.array(each, np.float64) for each in arrays)
    off, from_a, from_b = (
        np.linalg.norm(d, axis=-1, keepdims=True) for d in (a - b, a - x, b - x)
    )
    other = off > TOLERANCE * np.linalg.norm(b, axis=-1, keepdims=True)
    if other.mean() > _MOST_TIES:
        return got
    tied = other & (from_a <= _AS_GOOD * from_b)
    return mx.array(np.where(tied, b, a).astype(np.float32))


def _errors(got: mx.array, want: mx.array) -> tuple[float, float]:
    """Relative error of all, and the largest of a vector; NaN if any number is none."""
    with mx.stream(mx.cpu):
        a = np.array(got.astype(mx.float32), np.float64)
        b = np.array(want.astype(mx.float32), np.float64)
    if not np.isfinite(a).all():
        return math.nan, math.nan
    lengths = np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
    of_rows = np.linalg.norm(a - b, axis=-1) / lengths
    of_all = np.linalg.norm(a - b) / np.linalg.norm(b)
    return float(of_all), float(of_rows.max())

"""Levels that a kernel computes: the codebook as an odd polynomial of the code.

With n = 2**bits and u = (code - (n - 1) / 2) / n, Lloyd-Max levels are close to short
odd polynomials of u. Codecs store codes of those, so that the kernels' levels are the
definition's and no table is looked up. The price in squared error is nothing at 1 and 2
bits, 0.2% at 3 and 4, under 1% to 7 bits, 4% at 8 (of an error of 0.00004).
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from .codebook import Array, Codebook, lloyd_max, sphere_density

#: Terms u, u^3, ... per width, so degree 2 * terms - 1.
TERMS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 6}
#: Significant digits kept of a coefficient, so that all machines agree on the levels.
_DIGITS = 6


@functools.cache
def coefficients(dim: int, bits: int) -> tuple[float, ...]:
    """Coefficients of u, u^3, ...: least squares on the Lloyd-Max levels.

    Each level is weighted by the probability that it is the nearest one.
    """
    levels = np.array(lloyd_max(dim, bits).levels, dtype=np.float64)
    _, probability, _ = sphere_density(dim).cells(levels)
    weight = np.sqrt(probability)
    u = _centred(bits)
    powers = np.stack([u ** (2 * k + 1) for k in range(TERMS[bits])], axis=1)
    size = np.abs(powers).max(axis=0)
    weighted = powers / size * weight[:, None]
    fit = np.linalg.lstsq(weighted, levels * weight, rcond=None)[0]
    return tuple(float(f"{c:.{_DIGITS}g}") for c in fit / size)


@functools.cache
def polynomial_codebook(dim: int, bits: int) -> Codebook:
    """The codebook that codes are stored in, for ``bits`` 1..8.

    >>> polynomial_codebook(128, 3).mse / lloyd_max(128, 3).mse < 1.003
    True
    """
    u = _centred(bits)
    levels = sum(c * u ** (2 * k + 1) for k, c in enumerate(coefficients(dim, bits)))
    return Codebook.of(np.asarray(levels), sphere_density(dim))


def levels_of(codes: mx.array, bits: int, terms: tuple[float, ...]) -> mx.array:
    """Levels of codes, any integer dtype and shape, as float32.

    It is arithmetic, because a gather costs MLX's CPU backend 10 to 25 ns an element.

    Args:
        codes: Below 2**bits.
        bits: 1..8.
        terms: Coefficients of u, u^3, .... With ``coefficients(dim, bits)`` the result
            is ``polynomial_codebook(dim, bits).levels[codes]`` up to float32 rounding.
    """
    count = 2**bits
    u: mx.array = codes.astype(mx.float32) * (1 / count) - (count - 1) / (2 * count)
    return odd_polynomial(u, terms)


def odd_polynomial(u: mx.array, terms: tuple[float, ...]) -> mx.array:
    """The sum of terms[k] * u^(2k + 1), by Horner's rule."""
    *lower, highest = terms
    if not lower:
        return u * highest
    square = u * u
    total = square * highest + lower[-1]
    for c in reversed(lower[:-1]):
        total = total * square + c
    return total * u


def kernel_coefficients(terms: tuple[float, ...]) -> tuple[float, ...]:
    """The form in which attention kernels take a polynomial: a gain, then its shape.

    Levels are gain * u * P(s), s = u * u, with the gain left to the scales. P has one
    multiplication fewer than Horner's form where half precision allows:

        1 term    P = 1
        2 terms   P = s + a                    stored: a
        3 terms   P = (s + a)^2 + b            stored: a, b
        more      P = (... (a s + b) s + ...) s + 1    stored: a, b, ...

    A monic form of more terms would leave the range of halves.

    Args:
        terms: Coefficients of u, u^3, ....

    Returns:
        At least 8 numbers, padded with zeros.
    """
    count = len(terms)
    gain = terms[-1] if count <= 3 else terms[0]
    form = [c / gain for c in reversed(terms)]
    form = form[1:] if count <= 3 else form[:-1]
    if count == 3:
        a = form[0] / 2
        form = [a, form[1] - a * a]
    return (gain, *form, *[0.0] * (8 - count))


def _centred(bits: int) -> Array:
    """The u of every code: (2**bits,)."""
    count = 2**bits
    u: Array = (np.arange(count) - (count - 1) / 2) / count
    return u

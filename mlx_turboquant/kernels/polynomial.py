"""Codebook levels as odd polynomials, so that kernels need no table.

Owns the fit. With n = 2**bits levels and u = (code - (n - 1) / 2) / n, the levels of
1..5 bits are odd polynomials of u up to less than 0.05% of the quantization error;
beyond, none of useful degree is near enough and kernels keep a table.
"""

from __future__ import annotations

import functools

import numpy as np

from ..codebook import lloyd_max

#: Coefficients per width: degree 2 * terms - 1. 0 means a table.
TERMS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 0, 7: 0, 8: 0}


@functools.cache
def decoder_table(dim: int, bits: int) -> tuple[float, ...]:
    """What a kernel decodes with: coefficients of u, u^3, ..., or all the levels.

    Padded with zeros to at least 8 numbers.
    """
    levels = np.array(lloyd_max(dim, bits).levels, dtype=np.float64)
    count, terms = len(levels), TERMS[bits]
    if not terms:
        return tuple(levels.tolist())
    u = (np.arange(count) - (count - 1) / 2) / count
    powers = np.stack([u ** (2 * k + 1) for k in range(terms)], axis=1)
    # Levels near zero are the likelier ones.
    weight = np.exp(-(levels**2) / 6)[:, None]
    fit = np.linalg.lstsq(powers * weight, levels * weight[:, 0], rcond=None)[0]
    return (*fit.tolist(), *[0.0] * (8 - terms))

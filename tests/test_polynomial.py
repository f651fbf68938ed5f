import mlx.core as mx
import numpy as np
import pytest
from cases import each_bits

from mlx_turboquant.codebook import lloyd_max
from mlx_turboquant.polynomial import (
    TERMS,
    coefficients,
    kernel_coefficients,
    levels_of,
    polynomial_codebook,
)


@pytest.mark.parametrize("dim", [32, 64, 100, 128, 256, 512])
def test_the_error_is_lloyd_max_and_what_is_said(dim):
    cost = {3: 0.0023, 4: 0.002, 5: 0.003, 6: 0.006, 7: 0.0101, 8: 0.041}
    for bits in range(1, 9):
        extra = polynomial_codebook(dim, bits).mse / lloyd_max(dim, bits).mse - 1
        assert -1e-6 < extra < cost.get(bits, 1e-6)


@each_bits
@pytest.mark.parametrize("dim", [64, 128])
def test_the_kernels_form_gives_the_levels_in_halves(dim, bits):
    """Half arithmetic adds little to the quantization error."""
    book, terms = polynomial_codebook(dim, bits), TERMS[bits]
    levels = np.array(book.levels, dtype=np.float64)
    gain, *shape = kernel_coefficients(coefficients(dim, bits))
    form = [np.float16(c) for c in shape[: terms - 1]]
    n = len(levels)
    u = ((np.arange(n) - (n - 1) / 2) / n).astype(np.float16)
    square = u * u
    sum_ = np.ones_like(u)
    if terms in (2, 3):
        sum_ = square + form[0]
    if terms == 3:
        sum_ = sum_ * sum_ + form[1]
    if terms > 3:
        sum_ = form[0]
        for c in [*form[1:], np.float16(1)]:
            sum_ = sum_ * square + c
    value = gain * (sum_ * u).astype(np.float64)
    weight = np.exp(-(levels**2) / 2)
    extra = ((value - levels) ** 2 * weight).sum() / weight.sum()
    assert extra < (1e-3 if bits < 7 else 0.02) * book.mse


@each_bits
def test_levels_of_codes_are_the_codebook(bits):
    levels = polynomial_codebook(80, bits).levels
    got = levels_of(mx.arange(2**bits).astype(mx.uint8), bits, coefficients(80, bits))
    assert got.dtype == mx.float32
    assert mx.allclose(got, levels, rtol=1e-5, atol=1e-6).item()

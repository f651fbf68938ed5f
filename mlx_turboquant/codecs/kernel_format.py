"""What kernels are told of a codec: template constants and buffers of numbers.

`KernelFormat` is for kernels that read codes, `EncodeFormat` for those that make them.
The layouts themselves are in ``metal/formats.h`` and ``metal/encode*.metal``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from ..polynomial import kernel_coefficients

#: Kinds of formats, as ``metal/formats.h`` numbers them.
POLYNOMIAL, PAIRS, TRELLIS, ANGLES = range(4)
#: MLX hands arrays under 8 elements to a kernel as ``constant``, which our functions
#: do not take.
MIN_ELEMENTS = 8


@dataclass(frozen=True, eq=False)
class KernelFormat:
    """How attention and decode kernels read one codec's words.

    Attributes:
        kind: POLYNOMIAL, PAIRS, TRELLIS or ANGLES.
        bits: Bits of an element's code (POLYNOMIAL), or of a pair's.
        terms: Terms of the polynomial (POLYNOMIAL), an even element's own bits
            (TRELLIS), bits of a norm (ANGLES), or 0 (PAIRS).
        params: What attention decodes with, float32: a gain, then the polynomial
            (`polynomial.kernel_coefficients`), what makes a trellis' levels
            (`trellis_levels.Formula.params`) or the table, row by row.
        exact_params: What the decode kernel takes, float32: the polynomial's own
            coefficients, or ``params``.
        coefficients: Coefficients of u, u^3, ... (POLYNOMIAL); else empty.
    """

    kind: int
    bits: int
    terms: int
    params: mx.array
    exact_params: mx.array
    coefficients: tuple[float, ...] = ()

    @property
    def has_table(self) -> bool:
        """Whether levels are looked up rather than computed."""
        return self.kind in (PAIRS, ANGLES)

    @classmethod
    def polynomial(cls, bits: int, coefficients: tuple[float, ...]) -> KernelFormat:
        """The format of codes whose levels are a polynomial of the code."""
        params = mx.array(kernel_coefficients(coefficients))
        exact = mx.array([*coefficients, *[0.0] * MIN_ELEMENTS])
        mx.eval(params, exact)
        terms = len(coefficients)
        return cls(POLYNOMIAL, bits, terms, params, exact, coefficients)

    @classmethod
    def table(
        cls, kind: int, bits: int, terms: int, gain: float, table: mx.array
    ) -> KernelFormat:
        """The format of codes that look up ``table``, in multiples of ``gain``."""
        params = mx.concatenate([mx.array([gain]), table.reshape(-1)])
        mx.eval(params)
        return cls(kind, bits, terms, params, params)

    @classmethod
    def trellis(
        cls, bits: int, even_bits: int, params: tuple[float, ...]
    ) -> KernelFormat:
        """The format of windows whose levels are computed."""
        array = mx.array([*params, *[0.0] * MIN_ELEMENTS])
        mx.eval(array)
        return cls(TRELLIS, bits, even_bits, array, array)


@dataclass(frozen=True, eq=False)
class EncodeFormat:
    """How a kernel encodes for one codec, into words and one fp16 scale per vector.

    Attributes:
        kernel: Which kernel: ``"scalar"`` or ``"trellis"``.
        template: Its constants: BITS, GAINS and RULE, or COUNT, EVEN, ODD and RULE.
            RULE is an index into `scale_rules.RULES`.
        table: float32, at least 8 elements. Scalar: levels (2**BITS), boundaries
            (2**BITS - 1), inverse gains (GAINS). Trellis: levels of even and of odd
            elements by window (256 each) as the search sees them, their unit, and the
            levels themselves likewise (512).
        words: uint32 words of a vector.
    """

    kernel: Literal["scalar", "trellis"]
    template: dict[str, int]
    table: mx.array
    words: int

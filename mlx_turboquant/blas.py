"""A faster matrix product for MLX's CPU backend, where the system has one.

Owns one decision: on Linux, load OpenBLAS before MLX, so that MLX's calls bind to
it rather than to the reference BLAS in its wheel (measured on two cores: 1.7 to 110
GFLOP/s in float32). Never required; a no-op where the library is absent, on other
systems, or once MLX is loaded: import this package before MLX.
"""

from __future__ import annotations

import ctypes
import functools
import sys


@functools.cache
def prefer_openblas() -> bool:
    """Load ``libopenblas.so.0`` for everyone in this process; True if it worked.

    The package does so when it is imported; later calls say what came of it.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True

"""A faster matrix product for MLX's CPU backend, where the system has one.

Owns one decision: on Linux, load OpenBLAS before MLX, so that MLX's calls bind to
it rather than to the reference BLAS in its wheel (measured on two cores: 1.7 to 110
GFLOP/s in float32). Never required; a no-op where the library is absent, on other
systems, or once MLX is loaded: import this package before MLX.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

#: Where OpenBLAS, when it is loaded, looks up how long an idle thread spins: 2**n
#: cycles. It has no function for it. Its 2**26 last longer than a decode step and take
#: a core from MLX's streams.
_TIMEOUT, _SPINNING = "OPENBLAS_THREAD_TIMEOUT", "17"


@functools.cache
def prefer_openblas() -> bool:
    """Load ``libopenblas.so.0`` for everyone in this process; True if it worked.

    The package does so when it is imported; later calls say what came of it.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    chosen = os.environ.get(_TIMEOUT)
    os.environ.setdefault(_TIMEOUT, _SPINNING)
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    finally:
        if chosen is None:
            del os.environ[_TIMEOUT]
    return True

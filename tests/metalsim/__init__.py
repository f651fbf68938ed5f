"""A CPU simulator of Metal: runs kernels of ``mx.fast.metal_kernel`` on Linux x86-64.

MSL is compiled as C++ for OpenCL by clang >= 17, every GPU thread is a fiber, and
barriers and simd functions are meeting points. ``config.debug`` adds shadow memory:
bounds, data races, uninitialised reads. It says nothing of speed, and is needed, not
sufficient: a Mac has the last word.

    rewrite.py  token-level MSL to C++ for OpenCL     build.py  compilers and caches
    include/    the metal_stdlib shim                 check.py  static checks
    runtime/    fibers, collectives, shadow memory    core.py   metal_kernel, launching
    mlx_kernels.py  runs kernels of MLX's own headers
"""

from .build import CompileError, LaunchError, MetalSimError, config, find_clang
from .core import metal_kernel

__all__ = [
    "CompileError",
    "LaunchError",
    "MetalSimError",
    "config",
    "find_clang",
    "metal_kernel",
]

"""Kernels written once in ``metal/`` and launched on Metal or CUDA."""

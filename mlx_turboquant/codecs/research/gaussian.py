"""Random Gaussian matrices from a seed, written out rather than drawn from a library.

So the same seed gives the same matrix whatever the versions of numpy and MLX; the last
bits still depend on the machine's ``log`` and ``cos``.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from ...rotation import splitmix64


@functools.cache
def gaussian_matrix(rows: int, dim: int, seed: int) -> mx.array:
    """A matrix (rows, dim) float32 of independent standard normals.

    Uniforms are SplitMix64 in counter mode, as `rotation.rotation_signs`, under another
    stream; pairs of them become normals by Box and Muller.
    """
    count = 2 * -(-rows * dim // 2)
    z = splitmix64((1 << 63) + (seed << 32), count)
    uniform = ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    first, second = uniform[: count // 2], uniform[count // 2 :]
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    matrix = mx.array(normals[: rows * dim].reshape(rows, dim).astype(np.float32))
    mx.eval(matrix)
    return matrix

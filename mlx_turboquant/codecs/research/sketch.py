"""Sign sketches: the signs of a random Gaussian projection, and back.

Source: QJL (arXiv 2406.03482), Definition 3.1 and Lemma 3.2; TurboQuant (arXiv
2504.19874), Definition 1.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ...packing import pack, unpack
from ..scale_rules import clip_to_fp16
from .gaussian import gaussian_matrix


def sketch_of(x: mx.array, rows: int, seed: int) -> tuple[mx.array, mx.array]:
    """Signs of S x for x (..., D) float32, packed, and the length of x.

    Returns:
        (..., words of ``rows`` bits) uint32 and (..., 1) float16.
    """
    projected = x @ gaussian_matrix(rows, x.shape[-1], seed).T
    words = pack((projected > 0).astype(mx.uint32), 1)
    return words, clip_to_fp16(mx.linalg.norm(x, axis=-1, keepdims=True))


def from_sketch(
    words: mx.array, lengths: mx.array, rows: int, dim: int, seed: int
) -> mx.array:
    """||x|| sqrt(pi / 2) / rows * S^T signs, float32 (..., dim).

    An unbiased estimate of x, over seeds.
    """
    signs = unpack(words, 1, rows).astype(mx.float32) * 2 - 1
    projected_back = signs @ gaussian_matrix(rows, dim, seed)
    return projected_back * (math.sqrt(math.pi / 2) / rows) * lengths.astype(mx.float32)

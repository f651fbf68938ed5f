from __future__ import annotations

import mlx.core as mx


def pack(a):
    return mx.array([*a, *[0] * 8], dtype=mx.int32)

"""Causal masks, in the forms mlx-lm's models ask their caches for.

Owns no state; the caches pass their offset.
"""

from __future__ import annotations

import mlx.core as mx


def causal_mask(n: int, offset: int, window_size: int | None = None) -> mx.array:
    """Bool (n, offset + n): query i sees tokens up to offset + i, True attends.

    Args:
        n: New tokens.
        offset: Tokens before them.
        window_size: See only the last ``window_size`` tokens, or all if None.
    """
    last = mx.arange(offset, offset + n)[:, None]
    token = mx.arange(offset + n)[None]
    mask = token <= last
    if window_size is not None:
        mask = mask & (token > last - window_size)
    return mask


def make_mask(
    n: int, offset: int, return_array: bool, window_size: int | None
) -> mx.array | str | None:
    """What ``cache.make_mask`` returns: an array only where one is needed."""
    if window_size is not None or (return_array and n > 1):
        return causal_mask(n, offset, window_size)
    return None if n == 1 else "causal"

"""Which pages a bounded cache keeps: the latest, those attended to, and odd ones.

    a quarter                     the latest pages
    a quarter of the rest         those with the oddest key: a fact not yet asked
                                  for is seen in its keys, not in attention
    the others                    those that the latest queries put most weight on

The shares were chosen by divergence and facts found at three budgets (dev/LOG.md,
"eviction by score"). Owns the scores; what is forgotten when is `scored`'s.

Sources: attention of the latest queries as in SnapKV (arXiv 2404.14469, section 4);
keys far from the mean direction as in KeyDiff (arXiv 2504.15364, equation 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

#: Latest queries whose attention counts.
QUERIES = 32
_LATEST = 0.25
_ODD = 0.25


def kept_pages(
    keys: mx.array,
    queries: Sequence[mx.array],
    scale: float,
    *,
    first: int,
    page: int,
    held: int,
    count: int,
) -> list[int]:
    """The pages to keep, ascending.

    Args:
        keys: All tokens (B, H, T, D), decoded.
        queries: The latest (B, Hq, L, D), in parts; without any, age decides for them.
        scale: Factor on the logits.
        first: Tokens before the first page.
        page: Tokens of a page.
        held: Whole pages there are.
        count: Pages to keep.
    """
    latest = round(count * _LATEST)
    odd = round((count - latest) * _ODD)
    old = held - latest
    keys = keys.astype(mx.float32)
    oddness = _host(odd_keys(keys[:, :, first : first + held * page], page))[:old]
    attended = np.arange(old, dtype=np.float32)
    if queries:
        weights = attention_of_pages(queries, keys, scale, first, page, held)
        attended = _host(weights)[:old]
    kept = set(_best(oddness, odd))
    by_attention = (p for p in _best(attended, old) if p not in kept)
    kept |= {p for p, _ in zip(by_attention, range(count - latest - odd), strict=False)}
    return sorted(kept | set(range(old, held)))


def odd_keys(keys: mx.array, page: int) -> mx.array:
    """Of each page its oddest token: 1 - cosine to the mean direction, over heads.

    Args:
        keys: (B, H, pages * page, D), float32.
        page: Tokens of a page.

    Returns:
        (pages,) float32.
    """
    unit = keys / mx.maximum(mx.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    mean = mx.mean(unit, axis=2, keepdims=True)
    mean = mean / mx.maximum(mx.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    odd = mx.mean(1 - mx.sum(unit * mean, axis=-1), axis=(0, 1))
    return mx.max(odd.reshape(-1, page), axis=1)


def attention_of_pages(
    queries: Sequence[mx.array],
    keys: mx.array,
    scale: float,
    first: int,
    page: int,
    held: int,
) -> mx.array:
    """Weight that queries put on each page, mean over heads and queries: (held,)."""
    q = mx.concatenate(list(queries), axis=2)[:, :, -QUERIES:].astype(mx.float32)
    batch, heads, _, dim = keys.shape
    grouped = q.reshape(batch, heads, -1, dim) * scale
    weights = mx.softmax(grouped @ keys.swapaxes(2, 3), axis=-1)
    mean = mx.mean(weights[..., first : first + held * page], axis=(0, 1, 2))
    return mx.sum(mean.reshape(held, page), axis=1)


def _best(scores: npt.NDArray[np.float32], count: int) -> list[int]:
    """The ``count`` places with the highest scores; of equal ones the later."""
    order = np.argsort(scores[::-1], kind="stable")[::-1]
    return [len(scores) - 1 - int(place) for place in order[:count]]


def _host(array: mx.array) -> npt.NDArray[np.float32]:
    return np.array(array)

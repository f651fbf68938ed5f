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

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

#: Latest queries whose attention counts.
QUERIES = 32
_LATEST = 0.25
_ODD = 0.25


def kept_pages(
    keys: Callable[[slice], mx.array],
    queries: Sequence[mx.array],
    scale: float,
    *,
    kv_heads: int,
    first: int,
    page: int,
    held: int,
    count: int,
) -> list[int]:
    """The pages to keep, ascending.

    Args:
        keys: Decodes all tokens of some KV heads (B, heads, T, D). It is called for
            each head, so that no more than one is in memory.
        queries: The latest (B, Hq, L, D), in parts; without any, age decides for them.
        scale: Factor on the logits.
        kv_heads: KV heads there are.
        first: Tokens before the first page.
        page: Tokens of a page.
        held: Whole pages there are.
        count: Pages to keep.
    """
    in_pages = slice(first, first + held * page)
    odd_tokens = weights = mx.zeros((held * page,))
    q = mx.concatenate(list(queries), axis=2)[:, :, -QUERIES:] if queries else None
    for head in range(kv_heads):
        own = keys(slice(head, head + 1)).astype(mx.float32)
        odd_tokens = odd_tokens + oddness(own[:, :, in_pages])
        if q is not None:
            group = q.shape[1] // kv_heads
            own_q = q[:, head * group : (head + 1) * group]
            weights = weights + attention_weights(own_q, own, scale)[in_pages]
        mx.eval(odd_tokens, weights)
    latest = max(round(count * _LATEST), min(count, 1))
    odd = round((count - latest) * _ODD)
    old = held - latest
    oddest = np.array(mx.max(odd_tokens.reshape(held, page), axis=1))[:old]
    attended = np.arange(old, dtype=np.float32)
    if q is not None:
        attended = np.array(mx.sum(weights.reshape(held, page), axis=1))[:old]
    kept = set(_best(oddest, odd))
    by_attention = (p for p in _best(attended, old) if p not in kept)
    kept |= {p for p, _ in zip(by_attention, range(count - latest - odd), strict=False)}
    return sorted(kept | set(range(old, held)))


def oddness(keys: mx.array) -> mx.array:
    """Of each token of one head 1 - cosine to the mean direction, mean over rows.

    Args:
        keys: (B, 1, T, D), float32.

    Returns:
        (T,) float32.
    """
    unit = keys / mx.maximum(mx.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    mean = mx.mean(unit, axis=2, keepdims=True)
    mean = mean / mx.maximum(mx.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    return mx.mean(1 - unit @ mean.swapaxes(2, 3), axis=(0, 1, 3))


def attention_weights(q: mx.array, keys: mx.array, scale: float) -> mx.array:
    """Weight that queries (B, Hq, L, D) put on each token of their head, mean: (T,)."""
    grouped = q.astype(mx.float32).reshape(q.shape[0], 1, -1, q.shape[3]) * scale
    weights = mx.softmax(grouped @ keys.swapaxes(2, 3), axis=-1)
    return mx.mean(weights, axis=(0, 1, 2))


def _best(scores: npt.NDArray[np.float32], count: int) -> list[int]:
    """The ``count`` places with the highest scores; of equal ones the later."""
    order = np.argsort(scores[::-1], kind="stable")[::-1]
    return [len(scores) - 1 - int(place) for place in order[:count]]

"""Channel gains: what stored vectors are divided by, and why those numbers.

A rotation spreads a vector's quantization error evenly over its channels. With gains s
on the keys and 1/s on the queries, the variance of a logit's error is proportional to

    sum_c E[k_c^2] / s_c^2  *  sum_c E[q_c^2] s_c^2,

smallest at s_c^2 = sqrt(E[k_c^2] / E[q_c^2]) (Cauchy-Schwarz). That choice undoes any
gains a model has on its keys and, inversely, on its queries. Without queries, and for
values, s_c^2 = E[x_c^2], which undoes them too, but is the best choice only if what
reads the vectors has the inverse gains.

`cache.calibration` decides which tokens it is made of. `backends.gpu` has a kernel for
it, which is held to this.
"""

from __future__ import annotations

import mlx.core as mx

#: A channel weaker than this share of the root mean square counts as that strong: one
#: that the first page hardly uses must not be blown up.
FLOOR = 1e-3


def channel_gains(
    x: mx.array, centers: bool = False, query_power: mx.array | None = None
) -> mx.array:
    """Gains (B, H, 1, D) float32, of geometric mean 1 over the channels.

    Args:
        x: Vectors of a page (B, H, T, D).
        centers: Whether what is stored is what differs from their mean.
        query_power: `power_of` the queries' squares (B, H, 1, D); None for none.
    """
    power = channel_power(centred(x) if centers else x)
    gains = mx.sqrt(power) if query_power is None else (power / query_power) ** 0.25
    return gains / mx.exp(mx.mean(mx.log(gains), axis=-1, keepdims=True))


def centred(x: mx.array) -> mx.array:
    """Vectors (B, H, T, D) less their mean over T, float32."""
    x = x.astype(mx.float32)
    return x - mx.mean(x, axis=2, keepdims=True)


def channel_power(x: mx.array) -> mx.array:
    """Mean square per channel of (B, H, T, D): (B, H, 1, D) float32, above zero."""
    x = x.astype(mx.float32)
    return power_of(x * x)


def power_of(squares: mx.array) -> mx.array:
    """`channel_power` of vectors whose squares these are (B, H, T, D), float32.

    That of weak channels is raised; see `FLOOR`.
    """
    power = mx.mean(squares, axis=2, keepdims=True)
    floor = FLOOR**2 * mx.mean(power, axis=-1, keepdims=True)
    return mx.maximum(power, mx.maximum(floor, 1e-30))


def squares_of_queries(q: mx.array, kv_heads: int) -> mx.array:
    """Squares of queries (B, Hq, L, D), averaged over those of a KV head, float32."""
    batch, query_heads, _, dim = q.shape
    grouped = q.astype(mx.float32).reshape(
        batch, kv_heads, query_heads // kv_heads, -1, dim
    )
    return mx.mean(grouped * grouped, axis=2)

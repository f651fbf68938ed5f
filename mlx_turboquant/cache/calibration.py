"""What the first page of a text says about a layer: channel gains, sensitivities.

A rotation spreads a vector's quantization error evenly over its channels. With gains s
on the keys and 1/s on the queries, the variance of a logit's error is proportional to

    sum_c E[k_c^2] / s_c^2  *  sum_c E[q_c^2] s_c^2,

smallest at s_c^2 = sqrt(E[k_c^2] / E[q_c^2]) (Cauchy-Schwarz). That choice undoes any
gains a model has on its keys and, inversely, on its queries. Without queries, and for
values, s_c^2 = E[x_c^2], which undoes them too, but is the best choice only if what
reads the vectors has the inverse gains.

`Calibration` holds the queries seen so far, as squares on the first page, and the last
few as they are. When gains are made of them is `schedule`'s, what is made of the gains
`quantizers`'.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..tokens import TokenArrays

#: Last queries of a step that `far_value_sensitivity` looks at.
_LAST = 64
#: A channel weaker than this share of the root mean square counts as that strong: one
#: that the first page hardly uses must not be blown up.
_FLOOR = 1e-3


class Calibration:
    """Watches one layer until its first page is full.

    Args:
        skip: Tokens before the page: the sink.
        page: Tokens to look at.
    """

    def __init__(self, skip: int, page: int) -> None:
        self._skip, self._page = skip, page
        self._queries = TokenArrays(growth=skip + page)
        self.scale = 0.0
        self._last: mx.array | None = None

    @property
    def saw_whole_page(self) -> bool:
        """Whether the queries of the whole page were seen."""
        return self._queries.length >= self._skip + self._page

    def observe(self, q: mx.array, scale: float, kv_heads: int, offset: int) -> None:
        """See the queries q (B, Hq, L, D) of the last L of ``offset`` tokens."""
        batch, query_heads, length, dim = q.shape
        self._last, self.scale = q[:, :, -_LAST:], scale
        # Queries that leave a gap, or come a second time from a layer that shares the
        # cache, are not counted.
        if self.saw_whole_page or self._queries.length + length != offset:
            return
        q = q[:, :, : self._skip + self._page - self._queries.length]
        grouped = q.astype(mx.float32).reshape(
            batch, kv_heads, query_heads // kv_heads, -1, dim
        )
        self._queries.append({"squares": mx.mean(grouped * grouped, axis=2)})

    def trim(self, offset: int) -> None:
        """Forget the queries of tokens from ``offset`` on."""
        self._queries.drop_last(max(0, self._queries.length - offset))

    def key_gains(self, keys: mx.array) -> mx.array:
        """Gains (B, H, 1, Dk) float32 for the page's centred keys (B, H, page, Dk)."""
        k_power = _power(keys)
        if not self.saw_whole_page:
            return _normalised(mx.sqrt(k_power))
        return _normalised((k_power / self._query_power()) ** 0.25)

    def value_gains(self, values: mx.array) -> mx.array:
        """Gains (B, H, 1, Dv) for the page's values (B, H, page, Dv)."""
        return _normalised(mx.sqrt(_power(values)))

    def _query_power(self) -> mx.array:
        squares = self._queries.view("squares")[:, :, self._skip :]
        return _floored(mx.mean(squares, axis=2, keepdims=True))

    def logit_variance(self, keys: mx.array, gains: mx.array | None) -> mx.array | None:
        """What a relative error of 1 in the keys would add to each logit's variance.

        Args:
            keys: The page's centred keys (B, H, page, Dk).
            gains: The gains (B, H, 1, Dk) they will be divided by; None for none.

        Returns:
            A float32 scalar, the mean over heads; None if queries are missing.
        """
        if not self.saw_whole_page:
            return None
        squared = 1.0 if gains is None else gains * gains
        k_norm = mx.sum(_power(keys) / squared, axis=-1)
        q_norm = mx.sum(self._query_power() * squared, axis=-1)
        return self.scale**2 / keys.shape[-1] * mx.mean(k_norm * q_norm)

    def far_value_sensitivity(
        self, keys: mx.array, values: mx.array, near: int
    ) -> mx.array | None:
        """Relative squared output error per unit of relative squared value error.

        Only errors of values that will be quantized count (behind the sink, more than
        ``near`` tokens back): the sum of squared attention weights that the last
        queries put on them, times the values' mean square norm over the output's.

        Args:
            keys: All tokens so far, uncompressed (B, H, T, Dk).
            values: All tokens so far, uncompressed (B, H, T, Dv).
            near: Tokens that stay uncompressed behind each query.

        Returns:
            A float32 scalar; None if no query was seen.
        """
        if self._last is None:
            return None
        batch, _, length, dim = self._last.shape
        heads, total = keys.shape[1:3]
        k, v = keys.astype(mx.float32)[:, :, None], values.astype(mx.float32)
        q = self._last.astype(mx.float32).reshape(batch, heads, -1, length, dim)
        last = mx.arange(total - length, total)[:, None]
        token = mx.arange(total)
        logits = mx.where(token <= last, q @ k.swapaxes(-1, -2) * self.scale, -mx.inf)
        weights = mx.softmax(logits, axis=-1)
        far = (token <= last - near) & (token >= self._skip)
        out = weights @ v[:, :, None]
        squares = mx.sum(mx.where(far, weights * weights, 0.0), axis=-1)
        error = mx.mean(squares, axis=(2, 3)) * mx.mean(mx.sum(v * v, axis=-1), axis=2)
        return mx.mean(error) / mx.mean(mx.sum(out * out, axis=-1))

    @property
    def state(self) -> dict[str, mx.array]:
        """The arrays to save while the page is not full."""
        return self._queries.views() if self._queries.length else {}

    @state.setter
    def state(self, arrays: Mapping[str, mx.array]) -> None:
        self._queries.replace(arrays)


def by_power(x: mx.array) -> mx.array:
    """Channels of x (B, H, T, D), the strongest first: (B, H, 1, D) uint16."""
    return mx.argsort(-_power(x), axis=-1).astype(mx.uint16)


def _power(x: mx.array) -> mx.array:
    """Mean square per channel of (B, H, T, D): (B, H, 1, D) float32, above zero."""
    x = x.astype(mx.float32)
    return _floored(mx.mean(x * x, axis=2, keepdims=True))


def _floored(power: mx.array) -> mx.array:
    floor = _FLOOR**2 * mx.mean(power, axis=-1, keepdims=True)
    return mx.maximum(power, mx.maximum(floor, 1e-30))


def _normalised(gains: mx.array) -> mx.array:
    """Gains with a geometric mean of 1 over the channels."""
    return gains / mx.exp(mx.mean(mx.log(gains), axis=-1, keepdims=True))

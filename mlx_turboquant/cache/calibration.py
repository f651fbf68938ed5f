"""What the first page of a text says about a layer: channel gains, sensitivities.

`Calibration` holds the queries of the first page, and the last few as they are, if they
are wanted. When gains are made of them is `schedule`'s, how `gains`', what is made of
the gains `quantizers`'.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..backends.reference import Reference
from ..gains import channel_gains, channel_power, power_of, squares_of_queries
from ..tokens import TokenArrays
from .shallow import shallow

#: Last queries of a step that `far_value_sensitivity` looks at.
_LAST = 64


class Calibration:
    """Watches one layer until its first page is full.

    Args:
        skip: Tokens before the page: the sink.
        page: Tokens to look at.
        keeps_last: Whether the last queries are wanted, for sensitivities.
    """

    def __init__(self, skip: int, page: int, keeps_last: bool = False) -> None:
        self._skip, self._page = skip, page
        self._queries = TokenArrays(growth=skip + page)
        self.scale = 0.0
        self._keeps_last = keeps_last
        self._last: mx.array | None = None
        # Queries (B, Hq, skip + page, D), where one step had them all: then there are
        # no squares.
        self._whole: mx.array | None = None
        self._kv_heads = 0

    @property
    def saw_whole_page(self) -> bool:
        """Whether the queries of the whole page were seen."""
        wanted = self._skip + self._page
        return self._whole is not None or self._queries.length >= wanted

    def observe(self, q: mx.array, scale: float, kv_heads: int, offset: int) -> None:
        """See the queries q (B, Hq, L, D) of the last L of ``offset`` tokens."""
        length = q.shape[2]
        self.scale, self._kv_heads = scale, kv_heads
        if self._keeps_last:
            self._last = q[:, :, -_LAST:]
        # Queries that leave a gap, or come a second time from a layer that shares the
        # cache, are not counted.
        if self.saw_whole_page or self._queries.length + length != offset:
            return
        wanted = self._skip + self._page
        if length >= wanted and length == offset:
            self._whole = q[:, :, :wanted]
            return
        q = q[:, :, : wanted - self._queries.length]
        self._queries.append({"squares": squares_of_queries(q, kv_heads)})

    def fork(self) -> Calibration:
        """The same, for a text that goes on in another way."""
        other = shallow(self)
        other._queries = self._queries.fork()
        return other

    def trim(self, offset: int) -> None:
        """Forget the queries of tokens from ``offset`` on."""
        if self._whole is not None and offset < self._skip + self._page:
            self._queries.append(self.state)
            self._whole = None
        self._queries.drop_last(max(0, self._queries.length - offset))

    def key_gains(
        self, keys: mx.array, centers: bool, backend: Reference | None = None
    ) -> mx.array:
        """Gains (B, H, 1, Dk) float32 for the page's keys.

        Args:
            keys: The page's keys (B, H, page, Dk).
            centers: Whether the page's mean is taken off them.
            backend: What computes them; None for the definition.
        """
        backend = backend or Reference()
        if self._whole is not None:
            page = self._whole[:, :, self._skip :]
            return backend.channel_gains(keys, centers, page)
        if self.saw_whole_page:
            return channel_gains(keys, centers, self._query_power())
        return backend.channel_gains(keys, centers)

    def _query_power(self) -> mx.array:
        return power_of(self.state["squares"][:, :, self._skip :])

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
        k_norm = mx.sum(channel_power(keys) / squared, axis=-1)
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
        if self._whole is not None:
            return {"squares": squares_of_queries(self._whole, self._kv_heads)}
        return self._queries.views() if self._queries.length else {}

    @state.setter
    def state(self, arrays: Mapping[str, mx.array]) -> None:
        self._queries.replace(arrays)


def by_power(x: mx.array) -> mx.array:
    """Channels of x (B, H, T, D), the strongest first: (B, H, 1, D) uint16."""
    return mx.argsort(-channel_power(x), axis=-1).astype(mx.uint16)

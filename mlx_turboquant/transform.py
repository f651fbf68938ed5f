"""`ChannelTransform`: into the basis that codes live in, and back.

Stored vectors are divided by per-channel gains, their channels reordered, then rotated;
queries are multiplied by the gains, so that every logit stays what it was, and values
are multiplied back in the output. The gains make what a rotation spreads alike on all
channels, whatever the model's own scales are. Where they come from is
`cache.calibration`'s. Arrays in the basis have names that end in ``_rot``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from .rotation import Rotation, SplitRotation


@dataclass(frozen=True, eq=False)
class ChannelTransform:
    """A change of basis for the vectors of one side of one layer.

    Attributes:
        rotation: Applied last.
        gains: (B, H, 1, D) float32, positive; None for none.
        channel_order: (B, H, 1, D) integers, channels by rank; None to leave them.
    """

    rotation: Rotation | SplitRotation
    gains: mx.array | None = None
    channel_order: mx.array | None = None

    def encode(self, x: mx.array) -> mx.array:
        """Stored vectors x (B, H, T, D) in the basis, float32."""
        if self.gains is not None:
            x = x.astype(mx.float32) / self.gains
        return self.rotation.forward(_permute(x, self.channel_order))

    def encode_query(self, q: mx.array) -> mx.array:
        """Queries (B, Hq, L, D) whose products with encoded keys are q . k, float32."""
        return self.rotation.forward(_permute(self._times_gains(q), self.channel_order))

    def decode(self, x_rot: mx.array) -> mx.array:
        """The inverse of `encode`, also of weighted sums (B, Hq, L, D); float32."""
        back = None
        if self.channel_order is not None:
            back = mx.argsort(self.channel_order, axis=-1)
        return self._times_gains(_permute(self.rotation.inverse(x_rot), back))

    def _times_gains(self, x: mx.array) -> mx.array:
        if self.gains is None:
            return x
        batch, _, length, dim = x.shape
        grouped = x.astype(mx.float32).reshape(
            batch, self.gains.shape[1], -1, length, dim
        )
        return (grouped * self.gains[:, :, None]).reshape(x.shape)

    def of_heads(self, heads: slice) -> ChannelTransform:
        """The same for some KV heads."""
        gains = None if self.gains is None else self.gains[:, heads]
        order = None if self.channel_order is None else self.channel_order[:, heads]
        return ChannelTransform(self.rotation, gains, order)

    @functools.cached_property
    def signs_over_gains(self) -> mx.array:
        """What a kernel multiplies stored vectors with before the Hadamard transform.

        (B, H, 1, D) float32, or (D,) without gains.
        """
        return self._signs if self.gains is None else self._signs / self.gains

    @functools.cached_property
    def signs_times_gains(self) -> mx.array:
        """What a kernel multiplies queries with before it, and outputs after it."""
        return self._signs if self.gains is None else self._signs * self.gains

    @property
    def _signs(self) -> mx.array:
        if not isinstance(self.rotation, Rotation):
            raise TypeError(f"{self.rotation!r} has no signs of its own")
        return self.rotation.signs


def _permute(x: mx.array, order: mx.array | None) -> mx.array:
    """Channels of x (B, Hq, L, D) in the order of its KV head (B, H, 1, D)."""
    if order is None:
        return x
    order = mx.repeat(order, x.shape[1] // order.shape[1], axis=1)
    return mx.take_along_axis(x, mx.broadcast_to(order, x.shape), axis=-1)

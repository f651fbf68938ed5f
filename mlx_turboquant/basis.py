"""The basis codes live in: channels equalised, then rotated; and the means in it.

Owns `Basis` (per-channel gains and a rotation, one set per KV head) and `PageMeans`.
Where the gains come from is `cache.calibration`'s.

Stored vectors are divided by the gains, queries multiplied by them, so that every
logit stays what it was; values are multiplied back in the output. The gains make what
a rotation spreads alike on all channels, whatever the model's own scales are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from .rotation import Rotation


@dataclass(frozen=True, eq=False)
class Basis:
    """A change of basis for the vectors of one side of one layer.

    Attributes:
        rotation: Applied after the gains.
        gains: (B, H, 1, D) float32, positive; None for none.
    """

    rotation: Rotation
    gains: mx.array | None = None

    def into(self, x: mx.array) -> mx.array:
        """Stored vectors x (B, H, T, D) into the basis, float32."""
        if self.gains is not None:
            x = x.astype(mx.float32) / self.gains
        return self.rotation.forward(x)

    def query(self, q: mx.array) -> mx.array:
        """Queries (B, Hq, L, D) so that ``query(q) . into(k)`` is q . k, float32."""
        return self.rotation.forward(self._times_gains(q))

    def out(self, x_rot: mx.array) -> mx.array:
        """Undo `into`, also for weighted sums (B, Hq, L, D) of each group; float32."""
        return self._times_gains(self.rotation.inverse(x_rot))

    def _times_gains(self, x: mx.array) -> mx.array:
        if self.gains is None:
            return x
        batch, _, length, dim = x.shape
        grouped = x.astype(mx.float32).reshape(
            batch, self.gains.shape[1], -1, length, dim
        )
        return (grouped * self.gains[:, :, None]).reshape(x.shape)

    def of_heads(self, heads: slice) -> Basis:
        """The same for some KV heads."""
        if self.gains is None:
            return self
        return Basis(self.rotation, self.gains[:, heads])

    @functools.cached_property
    def signs_in(self) -> mx.array:
        """What a kernel multiplies stored vectors with before the transform."""
        signs = self.rotation.signs
        return signs if self.gains is None else signs / self.gains

    @functools.cached_property
    def signs_out(self) -> mx.array:
        """What it multiplies queries with before, and outputs after, the transform."""
        signs = self.rotation.signs
        return signs if self.gains is None else signs * self.gains


@dataclass(frozen=True, eq=False)
class PageMeans:
    """Key means that were taken off before encoding, already in the basis.

    Attributes:
        rows: (B, H, M, D) float16, whole buffers.
        page: Packed tokens to a row; more than there will ever be if one serves all.
        count: Rows in use.
    """

    rows: mx.array
    page: int
    count: int

    def of_tokens(self, first: int, count: int, heads: slice = slice(None)) -> mx.array:
        """For packed tokens from ``first``: (B, heads, count or 1, D) float32."""
        low = first // self.page
        rows = self.rows[:, heads, low : -(-(first + count) // self.page)].astype(
            mx.float32
        )
        if rows.shape[2] == 1:
            return rows
        start = first - low * self.page
        return mx.repeat(rows, self.page, axis=2)[:, :, start : start + count]

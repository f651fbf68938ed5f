"""What mlx-lm asks of any cache besides its tokens, in terms of `offset` and buffers.

Owns no state: a mixin for the caches of one sequence.
"""

from __future__ import annotations

import mlx.core as mx

from ..tokens import TokenArrays
from .masks import make_mask


class SequenceCache:
    """Answers that follow from ``offset`` and from the buffers of recent tokens."""

    _recent: TokenArrays

    @property
    def offset(self) -> int:
        """Tokens stored."""
        raise NotImplementedError

    def is_trimmable(self) -> bool:
        """Always: codes are independent of their neighbours."""
        return True

    def size(self) -> int:
        """Tokens stored."""
        return self.offset

    def shown_before(self) -> int:
        """Tokens that a step's attention shows besides its own."""
        return self.offset

    def empty(self) -> bool:
        """Whether no token is stored."""
        return self.offset == 0

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask for ``n`` new tokens behind those stored."""
        return make_mask(n, self.offset, return_array, window_size)

    # Real arrays that some models tie other work to with ``mx.depends``.

    @property
    def keys(self) -> mx.array | None:
        """The buffer of recent keys (B, H, capacity, Dk), or None when empty."""
        return self._recent.arrays.get("keys")

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._recent.arrays["keys"] = array

    @property
    def values(self) -> mx.array | None:
        """The buffer of recent values (B, H, capacity, Dv), or None when empty."""
        return self._recent.arrays.get("values")

    @values.setter
    def values(self, array: mx.array) -> None:
        self._recent.arrays["values"] = array

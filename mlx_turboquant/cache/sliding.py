"""`RotatingTurboQuantCache`: a compressed cache of a sliding window.

Owns what a window forgets. Models see the tokens that mlx-lm's ``RotatingKVCache``
would show them, in the order of the text: the first ``keep`` and the latest others,
``max_size`` in all, or up to ``max_size - 1`` before a step of several tokens. What
else is stored, at most a page, is hidden; whole pages are forgotten.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..errors import SpecError
from ..segments import CompressedTokens
from ..spec import CacheSpec
from . import state as files
from .bit_allocation import LayerSlot
from .layer import TurboQuantCache
from .masks import make_mask


def min_window(spec: CacheSpec) -> int:
    """Tokens a window must have for codes to be worth it: else few would be codes."""
    return spec.sink + spec.window + 2 * spec.page


class RotatingTurboQuantCache(TurboQuantCache):
    """A drop-in for mlx-lm's ``RotatingKVCache`` that stores codes.

    Args:
        spec: What to store; ``keep`` tokens are part of its sink.
        max_size: Tokens a step sees, itself included.
        keep: First tokens that are never forgotten.
        slot: As for `TurboQuantCache`.
        returns_arrays: As for `TurboQuantCache`.

    Raises:
        SpecError: if ``max_size`` is less than `min_window`, or not above ``keep``.

    >>> RotatingTurboQuantCache("k3v3", max_size=1024)
    RotatingTurboQuantCache(k3v3, empty)
    """

    def __init__(
        self,
        spec: CacheSpec | str | float = "k3v3",
        max_size: int = 4096,
        keep: int = 0,
        slot: LayerSlot | None = None,
        returns_arrays: bool = False,
    ) -> None:
        spec = CacheSpec.parse(spec)
        spec = replace(spec, sink=max(spec.sink, keep))
        if max_size < min_window(spec):
            raise SpecError(
                f"a window of {max_size} tokens is too short for {spec}: at least "
                f"{min_window(spec)} (sink, window and two pages); lower page= or "
                "window=, or leave it uncompressed"
            )
        self.max_size, self.keep = max_size, keep
        super().__init__(spec, slot, returns_arrays)

    def _clear(self) -> None:
        super()._clear()
        self._forgotten = 0  # tokens: of the sink, then whole pages
        self._first = 0  # position of the first one shown after those kept

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As `TurboQuantCache.update_and_fetch`; forgets what this step cannot see."""
        self._first = max(self.keep, self.offset - (self.max_size - 1 - self.keep))
        self._forget()
        return super().update_and_fetch(keys, values)

    def segments(self) -> tuple[CompressedTokens, CompressedTokens]:
        """Handles over everything stored, with what left the window hidden."""
        hidden = (self.keep, self._first - self.keep - self._forgotten)
        if hidden[1] <= 0:
            hidden = (0, 0)
        keys, values = super().segments()
        return replace(keys, hidden=hidden), replace(values, hidden=hidden)

    def _forget(self) -> None:
        spec = self.spec
        behind = self._first - spec.sink - self._pages_forgotten
        count = min(behind, self._packed.length) // spec.page * spec.page
        if count <= 0:
            return
        if not self._forgotten:
            kept = {k: v[:, :, : self.keep] for k, v in self._sink.items()}
            self._sink = {k: mx.contiguous(v) for k, v in kept.items() if self.keep}
            self._forgotten = spec.sink - self.keep
        self._packed.drop_first(count)
        self._sides = None
        self._encoder.drop(count)
        self._forgotten += count

    @property
    def _pages_forgotten(self) -> int:
        return max(0, self._forgotten - (self.spec.sink - self.keep))

    def _due(self) -> int:
        return super()._due() - self._pages_forgotten

    @property
    def offset(self) -> int:
        """Tokens seen, which is also the position of the next one."""
        return super().offset + self._forgotten

    def size(self) -> int:
        """Tokens the next step could see, at most ``max_size``."""
        return min(self.offset, self.max_size)

    def shown_before(self) -> int:
        """Tokens that a step's attention shows besides its own."""
        return min(self.offset, self.max_size - 1)

    def is_trimmable(self) -> bool:
        """Whether no token has left the window yet, as in mlx-lm."""
        return self.offset < self.max_size

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; none once tokens have left the window."""
        return super().trim(n) if self.is_trimmable() else 0

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask for ``n`` new tokens over those shown, in the order of the text."""
        before = self.shown_before()
        window = window_size or self.max_size
        if n > 1 and before + n <= window:
            return make_mask(n, before, return_array, None)
        if n == 1 and before < window:
            return None
        return make_mask(n, before, True, window)

    def _notes(self) -> files.Notes:
        return {
            **super()._notes(),
            "max_size": self.max_size,
            "keep": self.keep,
            "forgotten": self._forgotten,
            "first": self._first,
        }

    def _restore(
        self, spec: CacheSpec, groups: files.Groups, notes: files.Notes
    ) -> None:
        self.max_size, self.keep = notes["max_size"], notes["keep"]
        super()._restore(spec, groups, notes)
        self._forgotten, self._first = notes["forgotten"], notes["first"]

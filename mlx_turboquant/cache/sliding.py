"""`RotatingTurboQuantCache`: a compressed cache of a sliding window.

Owns what a window forgets. Models see the tokens that mlx-lm's ``RotatingKVCache``
would show them, in the order of the text: the first ``keep`` and the latest others,
``max_size`` in all, or up to ``max_size - 1`` before a step of several tokens. What
else is stored, at most a page, is hidden; whole pages are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import mlx.core as mx

from ..errors import SpecError
from ..segments import PreparedSteps
from ..spec import CacheSpec
from . import state as saved
from .bit_allocation import LayerSlot
from .layer import TurboQuantCache
from .protocol import causal_mask, make_mask


def min_window(spec: CacheSpec) -> int:
    """Tokens a window must have for codes to be worth it: else few would be codes."""
    return spec.sink + spec.window + 2 * spec.page


class RotatingTurboQuantCache(TurboQuantCache):
    """A drop-in for mlx-lm's ``RotatingKVCache`` that stores codes.

    Args:
        spec: What to store; ``keep`` tokens are part of its sink.
        max_size: Tokens a step sees, itself included.
        keep: First tokens that are never forgotten.
        slot: Its place among the layers whose bits are chosen together; alone if None.
        returns_arrays: Hand out decoded arrays, for a model that computes attention
            itself.
        sees_kept: Whether every token of a long step sees the kept ones, as in mlx-vlm,
            or only those whose window reaches back to them, as in mlx-lm.

    Raises:
        SpecError: if ``max_size`` is less than `min_window`, or not above ``keep``.

    >>> RotatingTurboQuantCache("k3v3", max_size=1024)
    RotatingTurboQuantCache(k3v3, empty)
    """

    _header_marks: ClassVar[Sequence[str]] = ("max_size",)

    def __init__(
        self,
        spec: CacheSpec | str | float = "k3v3",
        max_size: int = 4096,
        keep: int = 0,
        slot: LayerSlot | None = None,
        returns_arrays: bool = False,
        sees_kept: bool = False,
    ) -> None:
        spec = CacheSpec.parse(spec)
        spec = replace(spec, sink=max(spec.sink, keep))
        if max_size < min_window(spec):
            raise SpecError(
                f"a window of {max_size} tokens is too short for {spec}: at least "
                f"{min_window(spec)} (sink, window and two pages); lower page= or "
                "window=, or leave it uncompressed"
            )
        self.max_size, self.keep, self.sees_kept = max_size, keep, sees_kept
        super().__init__(spec, slot, returns_arrays)

    def _clear(self) -> None:
        super()._clear()
        self._evicted_sink = 0  # tokens
        self._evicted_pages = 0  # tokens, whole pages
        self._first_visible = 0  # position of the first one shown behind those kept

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As `TurboQuantCache.update_and_fetch`; forgets what this step cannot see."""
        self.make_room()
        return super().update_and_fetch(keys, values)

    def make_room(self) -> None:
        """Forget what the next step cannot see."""
        shown = self.max_size - 1 - self.keep
        self._first_visible = max(self.keep, self.offset - shown)
        self._evict()
        self._hide()

    def _hide(self) -> None:
        """Hide what left the window but is still stored: under a page, or the sink."""
        stored_before = self._first_visible - self._evicted_sink - self._evicted_pages
        count = stored_before - self.keep
        self._hidden = (self.keep, count) if count > 0 else (0, 0)

    def _evict(self) -> None:
        """Forget whole pages that no step can see any more."""
        spec = self.spec
        behind = self._first_visible - spec.sink - self._evicted_pages
        count = min(behind, self.packed_length) // spec.page * spec.page
        if count <= 0:
            return
        if not self._evicted_pages:
            # The sink goes with the first page, but for the tokens that are kept.
            self._tokens.cut_sink(self.keep)
            self._evicted_sink = spec.sink - self.keep
        self._tokens.drop_pages(range(count // spec.page))
        self._evicted_pages += count
        self._prepared = PreparedSteps()

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
        if not (self.sees_kept and self.keep and window == self.max_size):
            return make_mask(n, before, True, window)
        latest = causal_mask(n, before, window - self.keep)
        return latest | (causal_mask(n, before) & (mx.arange(before + n) < self.keep))

    def _numbers(self) -> saved.Numbers:
        return {
            **super()._numbers(),
            "max_size": self.max_size,
            "keep": self.keep,
            "sees_kept": int(self.sees_kept),
            "evicted_sink": self._evicted_sink,
            "evicted_pages": self._evicted_pages,
            "first_visible": self._first_visible,
        }

    def _restore(
        self, spec: CacheSpec, groups: saved.Groups, numbers: saved.Numbers
    ) -> None:
        self.max_size, self.keep = numbers["max_size"], numbers["keep"]
        self.sees_kept = bool(numbers.get("sees_kept", 0))  # older files are mlx-lm's
        super()._restore(spec, groups, numbers)
        self._evicted_sink = numbers["evicted_sink"]
        self._evicted_pages = numbers["evicted_pages"]
        self._first_visible = numbers["first_visible"]
        self.offset += self._evicted_sink + self._evicted_pages
        self._set_packed(self.packed_length + self._evicted_pages)
        self._hide()

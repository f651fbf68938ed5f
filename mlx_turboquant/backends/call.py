"""`AttendCall`, one attention over compressed tokens, and `Backend`, what serves it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx

from ..quantizer import Quantizer
from ..segments import CompressedTokens
from ..tokens import TokenArrays

Mask = mx.array | str | None


class AttendCall(NamedTuple):
    """Arguments of one attention; checked, and with something packed.

    Attributes:
        q: Queries (B, Hq, L, Dk), model dtype, not rotated, not scaled. Hq is a
            multiple of H.
        keys: H heads, T tokens, none of them hidden.
        values: H heads, T tokens, Dv elements.
        scale: Factor on the logits.
        mask: None, ``"causal"`` (the last query sees all), or a bool or additive array
            that broadcasts to (B, Hq, L, T).
        sink_logits: Learned logits (Hq,) that join the softmax with no value, or None.
    """

    q: mx.array
    keys: CompressedTokens
    values: CompressedTokens
    scale: float
    mask: Mask = None
    sink_logits: mx.array | None = None


class Backend(Protocol):
    """What a machine does with compressed tokens; `reference.Reference` defines it."""

    @property
    def name(self) -> str:
        """What `explain` calls it."""
        ...

    def refuse(self, keys: Quantizer, values: Quantizer) -> str | None:
        """Why it cannot attend to what these encode, or None if it can."""
        ...

    def attend(self, call: AttendCall) -> mx.array:
        """The attention's output (B, Hq, L, Dv) in q's dtype, not rotated."""
        ...

    def encode(self, quantizer: Quantizer, x: mx.array, first: int) -> TokenArrays:
        """`Quantizer.encode`."""
        ...

    def decode_rot(
        self, side: CompressedTokens, dtype: mx.Dtype, heads: slice
    ) -> mx.array:
        """`Quantizer.decode_rot` of the packed tokens, which there are."""
        ...

"""What attention sees of a compressed layer: handles that stand in for arrays.

Owns `CompressedTokens` (one side of one layer: sink, packed, recent) and `CompressedRows` (a
batch whose rows differ in length). They carry a truthful shape and dtype and refuse
every other use in words, so a model that reads K or V itself fails clearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import mlx.core as mx

from .codecs import Codec
from .errors import UnsupportedModelError
from .tokens import TokenArrays
from .transform import ChannelTransform, PageMeans


class CompressedKV:
    """Base of the stand-ins that ``update_and_fetch`` returns."""

    dtype: mx.Dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, T, D), as the array this stands for would have."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Always 4."""
        return 4

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Hand the queries of this step to a cache that wants to see them."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(mx.array, name):
            _refuse_use(name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _refuse_use(what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"this model's attention reads the cached keys or values itself ({what}), "
        "which packed codes cannot serve",
        "run it with an uncompressed cache (leave --kv-bits out)",
    )


def _refusing(name: str) -> Any:
    def operator(self: CompressedKV, *args: Any) -> NoReturn:
        _refuse_use(name)

    return operator


for _name in ("getitem", "matmul", "mul", "add", "sub", "truediv"):
    setattr(CompressedKV, f"__{_name}__", _refusing(f"__{_name}__"))


@dataclass(frozen=True, eq=False)
class CompressedTokens(CompressedKV):
    """One side of one layer, tokens in order.

    Attributes:
        codec: Of the packed tokens.
        basis: Of the packed tokens; its rotation is the codec's.
        sink: First tokens (B, H, S, D) as the model gave them; None if S is 0.
        packed: The codes between.
        recent: Last tokens (B, H, R, D) as the model gave them.
        means: What was taken off the packed tokens; None if nothing was.
        observe: Wants to see (q, scale) of the attention over this; None if not.
        hidden: (start, count) of stored tokens that nobody may see any more, such as
            those that left a sliding window; `shape` does not count them.
    """

    codec: Codec
    basis: ChannelTransform
    sink: mx.array | None
    packed: TokenArrays | None
    recent: mx.array
    means: PageMeans | None = None
    observe: Callable[[mx.array, float], None] | None = None
    hidden: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, T, D) over all segments, but hidden tokens."""
        batch, heads, recent, dim = self.recent.shape
        stored = self.sink_length + self.packed_length + recent
        return batch, heads, stored - self.hidden[1], dim

    @property
    def dtype(self) -> mx.Dtype:  # type: ignore[override]
        """The model's dtype, that of the uncompressed segments."""
        return self.recent.dtype

    @property
    def sink_length(self) -> int:
        """Tokens in the sink segment."""
        return 0 if self.sink is None else self.sink.shape[2]

    @property
    def packed_length(self) -> int:
        """Tokens stored as codes."""
        return 0 if self.packed is None else self.packed.length

    @property
    def observer(self) -> Callable[[mx.array, float], None] | None:
        """What wants to see the queries of each step."""
        return self.observe

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Hand queries (B, Hq, L, D) of the last L tokens to the cache."""
        if self.observe is not None:
            self.observe(q, scale)

    def __repr__(self) -> str:
        lengths = (self.sink_length, self.packed_length, self.recent.shape[2])
        return f"CompressedTokens({self.codec.spec}, sink+packed+recent {lengths})"


@dataclass(frozen=True, eq=False)
class CompressedRows(CompressedKV):
    """A batch of rows of different lengths, each with its own handle.

    Attributes:
        rows: Per row, what its own cache returned: a `CompressedTokens`, or an array
            (1, H, T, D) while the row holds nothing older than this step.
        spans: Per row, from where to where this step's tokens are real; what is before
            and behind is padding whose output nobody reads.
    """

    rows: Sequence[CompressedTokens | mx.array]
    spans: Sequence[tuple[int, int]]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, longest T, D)."""
        shapes = [row.shape for row in self.rows]
        _, heads, _, dim = shapes[0]
        return len(shapes), heads, max(shape[2] for shape in shapes), dim

    @property
    def dtype(self) -> mx.Dtype:  # type: ignore[override]
        """The model's dtype."""
        return self.rows[0].dtype

    @property
    def observer(self) -> Callable[[mx.array, float], None] | None:
        """What of the batch first wants to see queries."""
        observers = (getattr(row, "observer", None) for row in self.rows)
        return next((o for o in observers if o is not None), None)

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Hand each row's real queries of q (B, Hq, L, D) to its cache."""
        for index, (row, (start, stop)) in enumerate(
            zip(self.rows, self.spans, strict=True)
        ):
            if isinstance(row, CompressedTokens) and stop > start:
                row.observe_queries(q[index : index + 1, :, start:stop], scale)

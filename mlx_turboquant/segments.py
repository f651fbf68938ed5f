"""What attention sees of a compressed layer: handles that stand in for arrays.

`CompressedTokens` is one side of one layer: sink, packed and recent tokens. It carries
a truthful shape and dtype and refuses every other use in words, so a model that reads K
or V itself fails clearly. Handles of batches are `batch_handles`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import mlx.core as mx

from .errors import UnsupportedModelError
from .quantizer import Quantizer
from .tokens import Codes

Shape = tuple[int, int, int, int]


class QueryObserver(Protocol):
    """A cache that wants to see the queries of its first page."""

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """See queries (B, Hq, L, D) of the last L tokens, and the logits' factor."""
        ...


class PreparedSteps(dict[Any, Any]):
    """What a backend keeps between two pages, by what its calls have in common.

    It refers to the very buffers of one cache, so a copied cache starts without.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedSteps:
        return PreparedSteps()


class CompressedKV:
    """Base of the stand-ins that ``update_and_fetch`` returns."""

    __slots__ = ()

    @property
    def shape(self) -> Shape:
        """(B, H, T, D), as the array this stands for would have."""
        raise NotImplementedError

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype, that of the uncompressed tokens."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Always 4."""
        return 4

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Hand the queries of this step to a cache that wants to see them."""
        raise NotImplementedError

    # All that a model could do with an array is refused.

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(mx.array, name):
            _refuse_use(name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse_use("indexing")

    def __matmul__(self, other: Any) -> NoReturn:
        _refuse_use("@")

    def __add__(self, other: Any) -> NoReturn:
        _refuse_use("+")

    def __sub__(self, other: Any) -> NoReturn:
        _refuse_use("-")

    def __mul__(self, other: Any) -> NoReturn:
        _refuse_use("*")

    def __truediv__(self, other: Any) -> NoReturn:
        _refuse_use("/")


def _refuse_use(what: str) -> NoReturn:
    raise UnsupportedModelError(
        f"this model's attention reads the cached keys or values itself ({what}), "
        "which packed codes cannot serve",
        "run it with an uncompressed cache (leave --kv-bits out)",
    )


@dataclass(slots=True, eq=False)
class RowTokens:
    """One side of one layer of a sequence, but for its recent tokens.

    Attributes:
        quantizer: What the packed tokens were encoded with.
        sink: First tokens (B, H, S, D) as the model gave them; None if there are none.
        packed: The codes between; None while there are none.
    """

    quantizer: Quantizer
    sink: mx.array | None
    packed: Codes | None

    @property
    def sink_length(self) -> int:
        """Tokens in the sink segment."""
        return 0 if self.sink is None else self.sink.shape[2]

    @property
    def packed_length(self) -> int:
        """Tokens stored as codes."""
        return 0 if self.packed is None else self.packed.length


@dataclass(slots=True, eq=False)
class CompressedTokens(RowTokens, CompressedKV):
    """One side of one layer, tokens in order.

    Made anew at every step, so it is plain data and nothing is computed for it. It is
    valid until the next step: the buffers it refers to are written in place.

    Attributes:
        quantizer, sink, packed: As those of `RowTokens`.
        recent: Buffer (B, H, capacity, D) of the last tokens as the model gave them.
        recent_length: Tokens in use of it.
        hidden: (first, count) of stored tokens that nobody may see any more, such as
            those that left a sliding window; `shape` does not count them.
        backend: What attends to the packed tokens; None to ask `backends.select`.
        prepared: What that backend keeps from step to step; a new one whenever the
            packed tokens change.
        observer: The cache, while it wants to see the queries of each step.
    """

    recent: mx.array
    recent_length: int
    hidden: tuple[int, int] = (0, 0)
    backend: Any = None
    prepared: PreparedSteps = field(default_factory=PreparedSteps)
    observer: QueryObserver | None = None

    @property
    def shape(self) -> Shape:
        """(B, H, T, D) over all segments, but hidden tokens."""
        batch, heads, _, dim = self.recent.shape
        return batch, heads, self.stored_length - self.hidden[1], dim

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype, that of the uncompressed segments."""
        return self.recent.dtype

    @property
    def stored_length(self) -> int:
        """Tokens of all segments, hidden ones included."""
        return self.sink_length + self.packed_length + self.recent_length

    @property
    def stop(self) -> int:
        """Where the last recent token ends in its buffer."""
        return self.recent_length

    @property
    def recent_tokens(self) -> mx.array:
        """The recent tokens in use (B, H, R, D)."""
        if self.recent_length == self.recent.shape[2]:
            return self.recent
        return self.recent[:, :, : self.recent_length]

    def observe_queries(self, q: mx.array, scale: float) -> None:
        """Hand queries (B, Hq, L, D) of the last L tokens to the cache."""
        if self.observer is not None:
            self.observer.observe_queries(q, scale)

    def __repr__(self) -> str:
        lengths = (self.sink_length, self.packed_length, self.recent_length)
        spec = self.quantizer.codec.spec
        return f"CompressedTokens({spec}, sink+packed+recent {lengths})"

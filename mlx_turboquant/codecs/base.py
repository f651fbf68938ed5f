"""The `Codec` protocol and the one place that builds codecs from specs.

Owns the registry. A codec works on vectors that are already rotated (and, for keys,
centred); it never changes basis itself, it only says which rotation it wants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import mlx.core as mx

from ..rotation import Rotation, SplitRotation
from ..spec import CodecSpec
from ..tokens import TokenArrays

Side = Literal["keys", "values"]


class Codec(Protocol):
    """Encode and decode vectors of one dim, each token on its own."""

    @property
    def spec(self) -> CodecSpec:
        """The options it was built from."""
        ...

    @property
    def dim(self) -> int:
        """Elements per vector."""
        ...

    @property
    def rotation(self) -> Rotation | SplitRotation:
        """ChannelTransform that `encode` expects and `decode` returns."""
        ...

    @property
    def wants_centering(self) -> bool:
        """Whether it gains from a mean subtracted first."""
        ...

    @property
    def wants_equalizing(self) -> bool:
        """Whether it gains from channels made alike first."""
        ...

    @property
    def wants_ordering(self) -> bool:
        """Whether channels shall come by power, the strongest first."""
        ...

    @property
    def kernel_format(self): ...
    @property
    def encode_format(self): ...
    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that `encode` makes."""
        ...

    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Encode x_rot (B, H, T, dim), any float dtype.

        A token's codes depend on that token alone, not on its neighbours or place.
        """
        ...

    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """The used tokens as (B, heads, length, dim) in ``dtype``, still rotated."""
        ...

    @property
    def bits_per_vector(self) -> int:
        """Stored bits of one encoded vector: codes, padding and scales."""
        ...


class Traits:
    """What most codecs are like, for the properties of `Codec` that say so."""

    wants_centering: ClassVar[bool] = True
    wants_equalizing: ClassVar[bool] = True
    wants_ordering: ClassVar[bool] = False
    kernel_format = None
    encode_format = None


Builder = Callable[[CodecSpec, int, Side, int], Codec]
_BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Make ``name`` available to `codec_for`."""

    def add(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return add


@functools.cache
def codec_for(spec: CodecSpec, dim: int, side: Side, seed: int = 0) -> Codec:
    """The codec for one side of a cache, built once per process.

    Raises:
        UnsupportedError: if the rotation cannot do ``dim``.
    """
    return _BUILDERS[spec.name](spec, dim, side, seed)

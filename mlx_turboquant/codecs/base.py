"""`Codec`: what encodes and decodes the vectors of one side of a cache.

A codec works on vectors that are already rotated (and, for keys, centred); it never
changes basis itself, it only says which rotation it wants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import mlx.core as mx

from ..rotation import Rotation, SplitRotation
from ..tokens import TokenArrays
from .kernel_format import EncodeFormat, KernelFormat

if TYPE_CHECKING:
    from ..spec import CodecSpec

Side = Literal["keys", "values"]


@dataclass(frozen=True, eq=False)
class Codec(ABC):
    """Encodes and decodes vectors of one dim, each token on its own.

    Args:
        spec: The options it was built from.
        dim: Elements per vector.
        rotation: The rotation that `encode` expects and `decode` leaves in place.

    Attributes:
        wants_centering: Whether a mean is to be subtracted from keys first.
        wants_equalizing: Whether channels are to be divided by their gains first.
        wants_ordering: Whether channels are to be sorted by power, strongest first.
    """

    spec: CodecSpec
    dim: int
    rotation: Rotation | SplitRotation
    wants_centering: ClassVar[bool] = True
    wants_equalizing: ClassVar[bool] = True
    wants_ordering: ClassVar[bool] = False

    @property
    @abstractmethod
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that `encode` makes, in their order."""

    @abstractmethod
    def encode(self, x_rot: mx.array) -> TokenArrays:
        """Codes of x_rot (B, H, T, dim), any float dtype: arrays (B, H, T, .).

        A token's codes depend on that token alone, not on its neighbours or place.
        """

    @abstractmethod
    def decode(
        self, codes: TokenArrays, dtype: mx.Dtype, heads: slice = slice(None)
    ) -> mx.array:
        """The tokens in use as (B, heads, length, dim) in ``dtype``, still rotated."""

    @property
    @abstractmethod
    def bits_per_vector(self) -> int:
        """Stored bits of one encoded vector: codes, padding and scales."""

    @property
    def kernel_format(self) -> KernelFormat | None:
        """How attention and decode kernels read its codes; None if they cannot."""
        return None

    @property
    def encode_format(self) -> EncodeFormat | None:
        """How a kernel makes its codes; None if plain MLX does."""
        return None

"""Random orthogonal rotations of the last axis, and their inverses.

Every rotation is ``transform(signs * x)`` with an orthonormal transform, so norms and
dot products are kept. The signs of a seed are part of the saved format
(``docs/format.md``).

Source: TurboQuant (arXiv 2504.19874), Algorithm 1, line 1, with the randomized
Hadamard transform in place of a dense Gaussian QR factor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from .errors import UnsupportedError

MIN_DIM, MAX_DIM = 8, 1024
Kind = Literal["hadamard", "dct", "identity"]


def splitmix64(state: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The ``count`` numbers that SplitMix64 gives from a state below 2**64.

    Written out here, not drawn from a library, because saved caches must decode the
    same forever.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators".
    """
    # uint64 wraps round, as it should.
    z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(state)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def rotation_signs(dim: int, seed: int) -> list[int]:
    """The ``dim`` signs (+1 or -1) of a seed, by SplitMix64 in counter mode.

    Sign i is + when bit 0 of mix(seed * 2**32 + i) is 0, where mix adds the golden
    gamma once and finalizes.
    """
    odd = splitmix64(seed << 32, dim) & np.uint64(1)
    signs: list[int] = (1 - 2 * odd.astype(np.int64)).tolist()
    return signs


def _kind(dim: int) -> Kind:
    # Hadamard only where MLX's transform is safe and its own inverse. On the CPU it
    # corrupts memory for 72, 144, 288 and 576; for m = 20 and 28 (dims 80, 112, 160) it
    # is no involution. Every other dim takes the dense cosine transform.
    if dim & (dim - 1) == 0 or dim in (96, 192, 384, 768):
        return "hadamard"
    return "dct"


@dataclass(frozen=True)
class Rotation:
    """An orthogonal change of basis for vectors of ``dim`` elements.

    Build one with `rotation_for`. ``x_rot`` in names means "in this basis".
    """

    dim: int
    seed: int
    kind: Kind

    def forward(self, x: mx.array) -> mx.array:
        """Rotate x (..., dim), any float dtype, into float32 ``x_rot``.

        The identity leaves x as it is, dtype and all.
        """
        if self.kind == "identity":
            return x
        x = x.astype(mx.float32)
        if self.kind == "hadamard":
            return mx.hadamard_transform(x * self.signs, scale=self.dim**-0.5)
        return x @ self._matrix.T

    def inverse(self, x_rot: mx.array) -> mx.array:
        """Undo `forward`: ``x_rot`` (..., dim) to float32 (..., dim)."""
        x_rot = x_rot.astype(mx.float32)
        if self.kind == "identity":
            return x_rot
        if self.kind == "hadamard":
            return mx.hadamard_transform(x_rot, scale=self.dim**-0.5) * self.signs
        return x_rot @ self._matrix

    @property
    def signs(self) -> mx.array:
        """The signs as float32 (dim,)."""
        return _sign_array(self.dim, self.seed)

    @property
    def _matrix(self) -> mx.array:
        return _dct_matrix(self.dim, self.seed)


@dataclass(frozen=True)
class SplitRotation:
    """Two rotations side by side: of the first ``part`` elements and the others."""

    dim: int
    part: int
    seed: int
    kind: Literal["split"] = "split"

    @property
    def halves(self) -> tuple[Rotation, Rotation]:
        """The two rotations."""
        second = self.dim - self.part
        return rotation_for(self.part, self.seed), rotation_for(second, self.seed)

    def forward(self, x: mx.array) -> mx.array:
        """Rotate x (..., dim), any float dtype, into float32 ``x_rot``."""
        first, second = self.halves
        low, high = x[..., : self.part], x[..., self.part :]
        return mx.concatenate([first.forward(low), second.forward(high)], axis=-1)

    def inverse(self, x_rot: mx.array) -> mx.array:
        """Undo `forward`: ``x_rot`` (..., dim) to float32 (..., dim)."""
        first, second = self.halves
        low, high = x_rot[..., : self.part], x_rot[..., self.part :]
        return mx.concatenate([first.inverse(low), second.inverse(high)], axis=-1)


@functools.cache
def rotation_for(dim: int, seed: int, kind: Kind | None = None) -> Rotation:
    """The rotation this package uses for ``dim``.

    Args:
        dim: Elements per vector.
        seed: Seed of the signs, 0..2**32-1.
        kind: Force a transform; by default the fastest that is safe in MLX.

    Raises:
        UnsupportedError: if ``dim`` is outside 8..1024.
    """
    if kind != "identity" and not MIN_DIM <= dim <= MAX_DIM:
        raise UnsupportedError(
            f"head_dim {dim} is outside {MIN_DIM}..{MAX_DIM}, what the rotation can do",
            "keep this side uncompressed with 'k16v..' or 'k..v16'",
        )
    return Rotation(dim, seed, kind or _kind(dim))


@functools.cache
def _sign_array(dim: int, seed: int) -> mx.array:
    signs = mx.array(rotation_signs(dim, seed), dtype=mx.float32)
    mx.eval(signs)  # a lazy constant would tie the cache to the stream that made it
    return signs


@functools.cache
def _dct_matrix(dim: int, seed: int) -> mx.array:
    """Orthonormal DCT-II times the signs: a closed form, so files can rely on it."""
    k, j = np.arange(dim)[:, None], np.arange(dim)[None]
    dct = np.sqrt(2 / dim) * np.cos(np.pi * (j + 0.5) * k / dim)
    dct[0] /= np.sqrt(2)
    matrix = mx.array((dct * rotation_signs(dim, seed)).astype(np.float32))
    mx.eval(matrix)
    return matrix

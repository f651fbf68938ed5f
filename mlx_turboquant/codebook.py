"""Lloyd-Max codebooks: the levels of least squared error for a random number.

The number that matters is one coordinate of a randomly rotated vector, in units where
the vector has norm sqrt(dim): coordinates then have unit variance and levels hardly
depend on ``dim``. Their codebooks are solved offline for common dims
(``data/lloyd_max.json``, by ``benchmarks/solve_codebooks.py``). Any other density on an
interval is solved the same way.

Source: TurboQuant (arXiv 2504.19874), Lemma 1: a coordinate t of a uniform point on
the unit sphere in R^d has density proportional to (1 - t^2)^((d - 3) / 2).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
#: Digits that levels are rounded to, so that all machines agree on them.
_SPHERE_DIGITS, _INTERVAL_DIGITS = 7, 6
_SPHERE_CELLS, _INTERVAL_CELLS = 1 << 17, 1 << 14
_MAX_ROUNDS = 100


@dataclass(frozen=True, eq=False)
class Codebook:
    """Reconstruction levels and the decision boundaries half-way between them.

    Attributes:
        levels: Ascending float32 (count,).
        boundaries: Ascending float32 (count - 1,).
        mse: Expected squared error. For rotated coordinates, whose variance is 1, that
            is the relative error of vectors at their true norm: TurboQuant's D_mse.
    """

    levels: mx.array
    boundaries: mx.array
    mse: float

    @classmethod
    def of(cls, levels: Array, density: Density) -> Codebook:
        """The codebook with these ascending levels (count,)."""
        boundaries = (levels[1:] + levels[:-1]) / 2
        codebook = cls(
            levels=mx.array(levels.astype(np.float32)),
            boundaries=mx.array(boundaries.astype(np.float32)),
            mse=density.mse(levels),
        )
        mx.eval(codebook.levels, codebook.boundaries)
        return codebook

    def nearest(self, x: mx.array) -> mx.array:
        """Index (uint32, shape of x) of the level closest to x; ties go up."""
        return mx.searchsorted(self.boundaries, x, side="right")

    def __repr__(self) -> str:
        return f"Codebook({self.levels.size} levels, mse={self.mse:.5f})"


@functools.cache
def lloyd_max(dim: int, bits: int) -> Codebook:
    """The optimal scalar codebook for rotated vectors.

    Dims that are not shipped are solved at first use, in some 50 ms.

    Args:
        dim: Elements per vector, at least 4.
        bits: Bits per element, 1..8.
    """
    shipped = _shipped_levels().get(f"{dim}/{bits}")
    upper = np.array(shipped) if shipped else solve_sphere(dim, bits)
    levels = np.concatenate([-upper[::-1], upper])
    return Codebook.of(levels, sphere_density(dim))


def solve_sphere(dim: int, bits: int) -> Array:
    """Positive levels (ascending) for rotated coordinates, rounded to 7 digits."""
    levels = solve(sphere_density(dim), 2**bits)
    rounded: Array = np.round(levels[len(levels) // 2 :], _SPHERE_DIGITS)
    return rounded


def solve_interval(
    function: Callable[[Array], Array], high: float, count: int
) -> tuple[Array, Codebook]:
    """Levels for a density on 0..high: rounded to 6 digits, and as a codebook.

    Args:
        function: The density of points (N,), up to a factor.
        high: End of the interval.
        count: How many levels.
    """
    density = interval_density(function, high)
    levels: Array = np.round(solve(density, count), _INTERVAL_DIGITS)
    return levels, Codebook.of(levels, density)


def solve(density: Density, count: int) -> Array:
    """Ascending levels (count,) of the Lloyd-Max codebook, not rounded.

    Newton's method on the centroid condition c_i = E[x | b_i < x < b_{i+1}], whose
    Jacobian is tridiagonal, started from the Panter-Dite companding density.
    """
    levels = density.quantiles_of_cube_root(count)
    for _ in range(_MAX_ROUNDS):
        centroid, by_lower, by_upper = density.centroids(levels)
        jacobian = np.eye(count) - np.diag((by_lower + by_upper) / 2)
        jacobian -= np.diag(by_lower[1:] / 2, -1) + np.diag(by_upper[:-1] / 2, 1)
        step = np.linalg.solve(jacobian, centroid - levels)
        levels = levels + step
        if density.symmetric:
            levels = (levels - levels[::-1]) / 2
        if np.abs(step).max() < 1e-10:
            break
    return levels


@dataclass(frozen=True, eq=False)
class Density:
    """A density on a grid, linear in between.

    Attributes:
        x: Ascending points (N,).
        pdf: The density at x.
        cdf: How much of it lies below x.
        partial_mean: The integral of x * pdf below x.
        second_moment: E[x^2].
        symmetric: Whether it is even.
    """

    x: Array
    pdf: Array
    cdf: Array
    partial_mean: Array
    second_moment: float
    symmetric: bool

    def quantiles_of_cube_root(self, count: int) -> Array:
        """Where the cube root of the density, normalised, reaches (i + 1/2) / count."""
        mass = np.cumsum(np.cbrt(self.pdf) * np.gradient(self.x))
        wanted = (np.arange(count) + 0.5) / count * mass[-1]
        start: Array = np.interp(wanted, mass, self.x)
        return start

    def cells(self, levels: Array) -> tuple[Array, Array, Array]:
        """Edges (count + 1,) of the cells around levels, their mass, first moment."""
        inner = (levels[1:] + levels[:-1]) / 2
        edges = np.concatenate([[self.x[0]], inner, [self.x[-1]]])
        mass = np.diff(np.interp(edges, self.x, self.cdf))
        moment = np.diff(np.interp(edges, self.x, self.partial_mean))
        return edges, mass, moment

    def centroids(self, levels: Array) -> tuple[Array, Array, Array]:
        """Centroid of each cell, its derivatives by the lower and the upper edge."""
        edges, mass, moment = self.cells(levels)
        centroid = moment / mass
        pdf = np.interp(edges, self.x, self.pdf)
        by_lower = pdf[:-1] * (centroid - edges[:-1]) / mass
        by_upper = pdf[1:] * (edges[1:] - centroid) / mass
        by_lower[0] = by_upper[-1] = 0  # the outer edges do not move
        return centroid, by_lower, by_upper

    def mse(self, levels: Array) -> float:
        """Expected squared distance to the nearest level."""
        _, mass, moment = self.cells(levels)
        return float(
            self.second_moment + (mass * levels**2 - 2 * moment * levels).sum()
        )


def sphere_density(dim: int) -> Density:
    """The density of one coordinate, on a grid in theta: x = sqrt(dim) sin(theta)."""
    theta = np.linspace(-np.pi / 2, np.pi / 2, _SPHERE_CELLS + 1)
    weight = np.cos(theta) ** (dim - 2)
    total = np.concatenate([[0], np.cumsum((weight[1:] + weight[:-1]) / 2)])
    # d(theta)/dx turns the weight into a density of x.
    scale = total[-1] * (theta[1] - theta[0]) * np.sqrt(dim)
    pdf = np.cos(theta) ** (dim - 3) / scale
    return Density(
        x=np.sqrt(dim) * np.sin(theta),
        pdf=pdf,
        cdf=total / total[-1],
        # The mean below x has the closed form -(1 - t^2) * pdf * d / (d - 1).
        partial_mean=-pdf * np.cos(theta) ** 2 * dim / (dim - 1),
        second_moment=1.0,
        symmetric=True,
    )


def interval_density(function: Callable[[Array], Array], high: float) -> Density:
    """A density (up to a factor) on 0..high, constant within each grid cell."""
    x = np.linspace(0, high, _INTERVAL_CELLS + 1)
    middle = (np.arange(_INTERVAL_CELLS) + 0.5) / _INTERVAL_CELLS * high
    mass = function(middle)
    total = mass.sum()
    return Density(
        x=x,
        pdf=function(x) * (_INTERVAL_CELLS / high / total),
        cdf=np.concatenate([[0.0], np.cumsum(mass)]) / total,
        partial_mean=np.concatenate([[0.0], np.cumsum(mass * middle)]) / total,
        second_moment=float((mass * middle**2).sum() / total),
        symmetric=False,
    )


@functools.cache
def _shipped_levels() -> dict[str, list[float]]:
    path = files(__package__).joinpath("data/lloyd_max.json")
    table: dict[str, list[float]] = json.loads(path.read_text())["levels"]
    return table

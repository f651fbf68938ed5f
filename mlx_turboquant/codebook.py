"""Lloyd-Max codebooks for one coordinate of a randomly rotated vector.

Owns the density, the solver and the shipped table of its results. A codebook is in
units where a vector of ``dim`` elements has norm sqrt(dim), so coordinates have
unit variance and levels hardly depend on ``dim``.

Source: TurboQuant (arXiv 2504.19874), Lemma 1: a coordinate t of a uniform point on
the unit sphere in R^d has density proportional to (1 - t^2)^((d - 3) / 2).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import mlx.core as mx
import numpy as np

#: Dims solved offline and shipped in ``data/lloyd_max.json``; others are solved at
#: first use (some 50 ms). ``python -m mlx_turboquant.codebook`` writes the table.
TABLE_DIMS = (32, 48, 64, 72, 80, 96, 112, 128, 144, 160, 192, 256, 384, 512, 576)
TABLE_BITS = range(1, 9)
_DIGITS = 7
_GRID = 1 << 17

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Reconstruction levels and the decision boundaries half-way between them.

    Attributes:
        levels: Ascending float32 (2**bits,), odd-symmetric, unit-variance scale.
        boundaries: Ascending float32 (2**bits - 1,).
        mse: Expected squared error per element (relative, as the variance is 1)
            of a rotated vector quantized at its true norm: TurboQuant's D_mse.
    """

    dim: int
    bits: int
    levels: mx.array
    boundaries: mx.array
    mse: float

    def nearest(self, x: mx.array) -> mx.array:
        """Index (uint32, shape of x) of the level closest to x; ties go up."""
        return mx.searchsorted(self.boundaries, x, side="right")

    def __repr__(self) -> str:
        return f"Codebook(dim={self.dim}, bits={self.bits}, mse={self.mse:.5f})"


@functools.cache
def lloyd_max(dim: int, bits: int) -> Codebook:
    """The optimal scalar codebook for rotated vectors.

    Args:
        dim: Elements per vector, at least 4.
        bits: Bits per element, 1..8.
    """
    shipped = _table().get(f"{dim}/{bits}")
    upper = np.array(shipped) if shipped else solve(dim, bits)
    return codebook_of(dim, bits, np.concatenate([-upper[::-1], upper]))


def codebook_of(dim: int, bits: int, levels: Array) -> Codebook:
    """The codebook with the given ascending levels (2**bits,)."""
    boundaries = (levels[1:] + levels[:-1]) / 2
    book = Codebook(
        dim=dim,
        bits=bits,
        levels=mx.array(levels.astype(np.float32)),
        boundaries=mx.array(boundaries.astype(np.float32)),
        mse=_Density(dim).mse(levels),
    )
    mx.eval(book.levels, book.boundaries)
    return book


def cell_masses(dim: int, levels: Array) -> Array:
    """How likely each level (ascending) is the nearest to a coordinate."""
    mass: Array = _Density(dim).cells(levels)[1]
    return mass


def solve(dim: int, bits: int) -> Array:
    """Positive levels (ascending) of the Lloyd-Max codebook, rounded to 7 digits.

    Newton's method on the centroid condition c_i = E[x | b_i < x < b_{i+1}], whose
    Jacobian is tridiagonal, started from the Panter-Dite companding density.
    Rounding makes the result the same on every machine.
    """
    density = _Density(dim)
    levels = density.quantile_of_cube_root(2**bits)
    for _ in range(100):
        centroid, lower, upper = density.centroids(levels)
        jacobian = np.eye(len(levels)) - np.diag((lower + upper) / 2)
        jacobian -= np.diag(lower[1:] / 2, -1) + np.diag(upper[:-1] / 2, 1)
        step = np.linalg.solve(jacobian, centroid - levels)
        levels = levels + step
        levels = (levels - levels[::-1]) / 2
        if np.abs(step).max() < 1e-10:
            break
    rounded: Array = np.round(levels[len(levels) // 2 :], _DIGITS)
    return rounded


class _Density:
    """The density on a grid in theta, x = sqrt(dim) * sin(theta)."""

    def __init__(self, dim: int) -> None:
        theta = np.linspace(-np.pi / 2, np.pi / 2, _GRID + 1)
        weight = np.cos(theta) ** (dim - 2)
        total = np.concatenate([[0], np.cumsum((weight[1:] + weight[:-1]) / 2)])
        self.dim = dim
        self.x = np.sqrt(dim) * np.sin(theta)
        self.cdf = total / total[-1]
        # d(theta)/dx turns the weight into a density of x.
        scale = total[-1] * (theta[1] - theta[0]) * np.sqrt(dim)
        self.pdf = np.cos(theta) ** (dim - 3) / scale
        # The mean below x has the closed form -(1 - t^2) * pdf * d / (d - 1).
        self.partial_mean = -self.pdf * np.cos(theta) ** 2 * dim / (dim - 1)

    def quantile_of_cube_root(self, count: int) -> Array:
        mass = np.cumsum(np.cbrt(self.pdf) * np.gradient(self.x))
        wanted = (np.arange(count) + 0.5) / count * mass[-1]
        start: Array = np.interp(wanted, mass, self.x)
        return start

    def cells(self, levels: Array) -> tuple[Array, Array, Array]:
        """Edges of the cells around levels, their mass and their first moment."""
        inner = (levels[1:] + levels[:-1]) / 2
        edges = np.concatenate([[self.x[0]], inner, [self.x[-1]]])
        mass = np.diff(np.interp(edges, self.x, self.cdf))
        moment = np.diff(np.interp(edges, self.x, self.partial_mean))
        return edges, mass, moment

    def centroids(self, levels: Array) -> tuple[Array, Array, Array]:
        """Centroid of each cell, its derivative by the lower and the upper edge."""
        edges, mass, moment = self.cells(levels)
        centroid = moment / mass
        pdf = np.interp(edges, self.x, self.pdf)
        lower = pdf[:-1] * (centroid - edges[:-1]) / mass
        upper = pdf[1:] * (edges[1:] - centroid) / mass
        lower[0] = upper[-1] = 0  # the outer edges do not move
        return centroid, lower, upper

    def mse(self, levels: Array) -> float:
        _, mass, moment = self.cells(levels)
        return float(1 + (mass * levels**2 - 2 * moment * levels).sum())


@functools.cache
def _table() -> dict[str, list[float]]:
    path = files(__package__).joinpath("data/lloyd_max.json")
    table: dict[str, list[float]] = json.loads(path.read_text())["levels"]
    return table


def solve_table() -> dict[str, Any]:
    """Solve every shipped codebook: what ``data/lloyd_max.json`` must hold."""
    levels = {f"{d}/{b}": solve(d, b).tolist() for d in TABLE_DIMS for b in TABLE_BITS}
    about = "Positive Lloyd-Max levels, key dim/bits; see mlx_turboquant/codebook.py"
    return {"about": about, "levels": levels}


if __name__ == "__main__":
    path = files(__package__).joinpath("data/lloyd_max.json")
    rows = solve_table()
    body = ",\n".join(
        f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in rows["levels"].items()
    )
    text = f'{{"about": {json.dumps(rows["about"])},\n "levels": {{\n{body}\n}}}}\n'
    with open(str(path), "w") as out:
        out.write(text)

"""Facts of a GPU that every kernel takes for granted, each expected and found.

One small kernel (``metal/probe.metal``) shows them, so that a machine on which one is
otherwise says which, before kernels on which it would tell in a wrong number. A fact
is held to what the headers of ``metal/compat`` mean by their words, in any dialect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..kernels.arguments import pack
from ..kernels.kernel import Launch, Launcher
from ..kernels.probe import PROBE, ProbeArguments

#: Threads of the probe, and words of threadgroup memory: 28 kB, which the largest
#: kernels may take (the search for trellis codes).
THREADS, WORDS = 128, 7 << 10
_SEED = 12345

#: Of a lane of a product's operands: ``tq_major`` and ``tq_minor``.
_MAP = "rows major and major + 8, columns 2 minor and 2 minor + 1"

Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        name: What it is about.
        expected: What kernels count on.
        found: What the machine did; equal to ``expected`` if it did that.
        is_needed: Whether kernels are wrong without; else it is good to know.
    """

    name: str
    expected: str
    found: str
    is_needed: bool = True

    @property
    def holds(self) -> bool:
        """Whether kernels can rely on it, or need not."""
        return self.found == self.expected or not self.is_needed

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class _Product:
    """left (16, 16) times right (8, 16) transposed, added to a number."""

    left: Floats
    right: Floats
    start: float = 0.0

    @property
    def result(self) -> Floats:
        return self.start + self.left @ self.right.T


def facts(launcher: Launcher) -> list[Fact]:
    """Run the probe and say what it found."""
    products = _products()
    lanes, results = _run(launcher, products)
    thread = np.arange(THREADS)
    lane = thread % 32
    halves, floats, powers = _numbers()
    found = [
        Fact("threads of a simdgroup", "32", _only(lanes[8])),
        _same("lane of a thread", "index % 32", lanes[0], lane),
        _same("simdgroup of a thread", "index / 32", lanes[1], thread // 32),
        _same("simd_max", "the largest", lanes[9], np.full(THREADS, 31)),
        _same("simd_any", "true if one is", lanes[10], np.ones(THREADS)),
        _same("simd_shuffle", "the lane asked for", lanes[11], (lane * 5 + 3) % 32),
        *(
            _same(f"simd_shuffle_xor {1 << bit}", "its partner", got, lane ^ (1 << bit))
            for bit, got in enumerate(lanes[12:])
        ),
        _same(
            f"threadgroup memory of {WORDS * 4} bytes",
            "what others wrote",
            lanes[2],
            np.zeros(THREADS),
        ),
        _same("halves as floats", "exact, subnormal too", lanes[3], halves),
        _same("floats as halves", "nearest, ties to even", lanes[4], floats),
        _near("exp2", lanes[5], powers),
    ]
    # Which row (of 0 to 7) and pair of columns of a fragment each lane has.
    major, minor = lanes[6, :32].astype(int), lanes[7, :32].astype(int)
    for way, got in zip(("logits", "values"), results, strict=True):
        want = [_of_lanes(product.result, major, minor) for product in products]
        where = _places(got[0], want[0], products[0].result, major, minor)
        found.append(Fact(f"lanes of fragments, {way}", _MAP, where or _MAP))
        wrong = _sums(got[1:4], want[1:4])
        found.append(Fact(f"sums of products, {way}", "float32", wrong or "float32"))
        # Weights are too large to be subnormal (softmax_state.h), levels as well.
        wrong = _sums(got[4:], want[4:])
        found.append(Fact(f"subnormal halves in {way}", "kept", wrong or "kept", False))
    return found


def _run(launcher: Launcher, products: list[_Product]) -> tuple[Floats, list[Floats]]:
    """Facts (17, THREADS) of threads, and products (cases, 4, 32) of both ways."""
    half = mx.float16
    halves, floats, powers = (mx.array(x) for x in _inputs())
    left = np.stack([p.left for p in products]).astype(np.float16)
    right = np.stack([p.right for p in products]).astype(np.float16)
    weights = np.ascontiguousarray(right.swapaxes(1, 2))
    starts = np.zeros(8, np.float32)
    starts[: len(products)] = [p.start for p in products]
    launch = Launch(
        PROBE,
        [("WORDS", WORDS), ("THREADS", THREADS)],
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(17, THREADS), (len(products), 2, 4, 32)],
        output_dtypes=[mx.float32, mx.float32],
    )
    inputs = [
        halves.astype(half),
        floats,
        powers,
        mx.array(left.view(np.uint32)),
        mx.array(right),
        mx.array(weights.view(np.uint32)),
        mx.array(starts),
        pack(ProbeArguments(len(products), _SEED)),
    ]
    outputs = launcher(launch, inputs)
    mx.eval(outputs)
    lanes, results = (np.array(x, np.float64) for x in outputs)
    return lanes, [results[:, way] for way in (0, 1)]


def _inputs() -> tuple[npt.NDArray[np.float32], ...]:
    """Halves, floats and powers, one of each for a lane."""
    halves = np.array([2.0**-24, -3 * 2.0**-24, 2.0**-15, 1, -2, 65504, 0, 2.0**-14])
    floats = np.array(
        [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-24, 1.5 * 2.0**-25, -65503, 0.1, 0, 2049]
    )
    powers = np.array([-np.inf, -1e30, -20.3, -1, 0, 0.37, 7.9, -3e38])
    return tuple(np.tile(x, 4).astype(np.float32) for x in (halves, floats, powers))


def _numbers() -> list[Floats]:
    """What threads must make of `_inputs`."""
    halves, floats, powers = _inputs()
    made = halves, floats.astype(np.float16), np.exp2(powers.astype(np.float64))
    return [np.tile(x.astype(np.float64), THREADS // 32) for x in made]


def _products() -> list[_Product]:
    """The map of lanes; three sums that halves cannot hold; two with subnormals."""
    rng = np.random.default_rng(0)
    while True:  # until every result tells where it belongs
        left = rng.integers(0, 32, (16, 16)).astype(np.float64)
        right = rng.integers(0, 32, (8, 16)).astype(np.float64)
        if len(np.unique(left @ right.T)) == 128:
            break

    def first(x: float, rows: int) -> Floats:
        alone = np.zeros((rows, 16))
        alone[:, 0] = x
        return alone

    many = np.ones((16, 16))
    many[:, 0] = 2048
    return [
        _Product(left, right),
        _Product(first(2.0**-10, 16), first(2.0**-10, 8), 1.0),
        _Product(first(1, 16), first(1, 8), 4096.0),
        _Product(many, np.ones((8, 16))),
        _Product(first(2.0**-24, 16), first(2.0**10, 8)),
        _Product(first(2.0**10, 16), first(2.0**-24, 8)),
    ]


def _only(got: Floats) -> str:
    """The number that all are, or all that there are."""
    return ", ".join(f"{x:g}" for x in np.unique(got))


def _same(name: str, expected: str, got: Floats, want: npt.NDArray[Any]) -> Fact:
    return Fact(name, expected, _first(got, want, got != want) or expected)


def _near(name: str, got: Floats, want: Floats) -> Fact:
    """Of a function in float32, which may be a rough one: halves come of it."""
    expected = "within 1e-4, 0 of -inf"
    off = ~(np.abs(got - want) <= 1e-4 * want)
    return Fact(name, expected, _first(got, want, off) or expected)


def _first(got: Floats, want: npt.NDArray[Any], wrong: npt.NDArray[np.bool_]) -> str:
    """The first thread whose number is wrong, or ""."""
    if not wrong.any():
        return ""
    at = int(np.argmax(wrong))
    return f"{got[at]:g} for {want[at]:g} in thread {at}, {wrong.sum()} wrong in all"


def _of_lanes(result: Floats, major: _Ints, minor: _Ints) -> Floats:
    """A product (16, 8) as lanes have it (4, 32)."""
    rows = major + np.array([0, 0, 8, 8])[:, None]
    columns = 2 * minor + np.array([0, 1, 0, 1])[:, None]
    picked: Floats = result[rows, columns]
    return picked


def _places(
    got: Floats, want: Floats, result: Floats, major: _Ints, minor: _Ints
) -> str:
    """The first lane whose element is another's, or ""; every element is unlike."""
    wrong = np.argwhere(got != want)
    if not wrong.size:
        return ""
    element, lane = wrong[0]
    row, column = major[lane] + element // 2 * 8, 2 * minor[lane] + element % 2
    place = np.argwhere(result == got[element, lane])
    other = f"({place[0][0]}, {place[0][1]})" if place.size else "another sum"
    return (
        f"{other} for ({row}, {column}) as element {element} of lane {lane}, "
        f"{len(wrong)} wrong in all"
    )


def _sums(got: Floats, wants: list[Floats]) -> str:
    """The first sum that is another, or ""."""
    for of_lanes, want in zip(got, wants, strict=True):
        wrong = np.argwhere(of_lanes != want)
        if wrong.size:
            at = tuple(wrong[0])
            return f"{float(of_lanes[at])!r} for {float(want[at])!r}"
    return ""

"""Tail-biting Viterbi search: the path of least squared error round a trellis.

The search is spelled twice: in mx, which runs anywhere and defines it, and in numpy on
a few threads, two to three times as fast on a CPU. Both return windows, not bits.

Time runs from a vector's last element to its first. A step's window holds ``window``
bits, the newest (the element's own) lowest; what it shares with the step before is its
state:

    window of step t     | state, from step t - 1 | own bits |
    window of step t + 1          | state, from step t  | own bits |

The trellis bites its tail: the state before the first step is the one after the last.
Trying every such state would cost 128 searches, so there are two passes. The first goes
over ``2 * overlap`` steps around the end and says which state the path has there; the
second goes round once, held to that state. Targets and levels are whole numbers, so
that costs are exact and every machine takes the same path.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

#: Targets are clipped here: at one and a half times the largest level, 254.
CLIP = 380
#: Vectors searched together: more mean fewer calls of numpy and more memory.
_BATCH = 1024
#: Above every path's cost, and still a whole number in float32.
_INFINITE_COST = 1 << 22

Floats = np.ndarray[Any, np.dtype[np.float32]]
Windows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class TrellisGraph:
    """The trellis that is searched.

    Attributes:
        window: Bits of a window.
        widths: Own bits of a step, in turns: one number, or two for half rates.
        levels: (len(widths), 2**window) float32, by turn and window, whole numbers.
    """

    window: int
    widths: tuple[int, ...]
    levels: Floats

    def width(self, step: int) -> int:
        """Own bits of a step."""
        return self.widths[step % len(self.widths)]

    @property
    def overlap(self) -> int:
        """Steps on either side of the end that the first pass sees.

        A multiple of 8, for kernels. With more own bits fewer steps have a say: this
        many have 0.4 to 0.7% more error than all, at 1 and 1.5 bits 0.9%.
        """
        return 16 if self.widths[0] + self.widths[-1] > 6 else 32

    def states(self, step: int) -> int:
        """How many states there are before a step."""
        return 1 << (self.window - self.width(step))


def best_windows(graph: TrellisGraph, y: mx.array) -> mx.array:
    """Windows (N, dim) uint32 of the nearest codewords to y (N, dim), by element.

    Args:
        graph: The trellis.
        y: Whole numbers from -`CLIP` to `CLIP`, float32; dim is a multiple of 32. On a
            CPU this waits for y.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return _search_on_threads(graph, y)
    windows = _MxSearch(graph).search(y[:, ::-1].T)
    return windows.T[:, ::-1].astype(mx.uint32)


def _search_on_threads(graph: TrellisGraph, y: mx.array) -> mx.array:
    by_step = np.array(y)[:, ::-1].T
    pool, threads = _pool()
    width = max(1, min(_BATCH, -(-by_step.shape[1] // threads)))
    batches = [
        np.ascontiguousarray(by_step[:, i : i + width])
        for i in range(0, by_step.shape[1], width)
    ]
    windows = list(pool.map(_NumpySearch(graph).search, batches))
    by_element = np.concatenate(windows, axis=1).T[:, ::-1]
    return mx.array(np.ascontiguousarray(by_element).astype(np.uint32))


_pools: list[tuple[ThreadPoolExecutor, int]] = []


def _pool() -> tuple[ThreadPoolExecutor, int]:
    """The threads of this process, and how many they are."""
    if not _pools:
        count = os.cpu_count() or 1
        _pools.append((ThreadPoolExecutor(count, "viterbi"), count))
    return _pools[0]


def _overlap_steps(graph: TrellisGraph, steps: int) -> tuple[list[int], int]:
    """Steps of the first pass, and how many of them come before the end."""
    overlap = min(graph.overlap, steps // 2)
    return [i % steps for i in range(steps - overlap, steps + overlap)], overlap


class _NumpySearch:
    """The search over vectors as columns, (steps, N)."""

    def __init__(self, graph: TrellisGraph) -> None:
        self.graph = graph

    def search(self, y: Floats) -> Windows:
        """Windows (steps, N) of y (steps, N)."""
        steps, count = y.shape
        around, overlap = _overlap_steps(self.graph, steps)
        start = np.zeros((self.graph.states(0), count), np.float32)
        costs, final = self._forward(y, around, start)
        path = self._backward(y, around, costs, final.argmin(axis=0))
        boundary_state = path[overlap] >> self.graph.width(0)
        start = np.full((self.graph.states(0), count), _INFINITE_COST, np.float32)
        start[boundary_state, np.arange(count)] = 0
        once_round = list(range(steps))
        costs, _ = self._forward(y, once_round, start)
        return self._backward(y, once_round, costs, boundary_state)

    def _forward(
        self, y: Floats, order: list[int], cost: Floats
    ) -> tuple[list[Floats], Floats]:
        """Least costs (states, N) before each step of ``order``, and after the last."""
        graph, count = self.graph, y.shape[1]
        branch = np.empty((1 << graph.window, count), np.float32)
        costs = []
        for step in order:
            costs.append(cost)
            levels = graph.levels[step % len(graph.widths), :, None]
            np.subtract(y[step], levels, branch)
            np.multiply(branch, branch, branch)
            branch.reshape(len(cost), -1, count)[...] += cost[:, None]
            states = graph.states(step + 1)
            cost = np.minimum.reduce(branch.reshape(-1, states, count), axis=0)
        return costs, cost

    def _backward(
        self, y: Floats, order: list[int], costs: list[Floats], state: Windows
    ) -> Windows:
        """Windows (steps, N) of the best path that ends in ``state`` (N,)."""
        graph, count = self.graph, y.shape[1]
        path = np.empty((len(order), count), np.int64)
        columns = np.arange(count)
        for at in range(len(order) - 1, -1, -1):
            step = order[at]
            # Windows that lead to the state: they differ in their oldest bits.
            oldest = np.arange(1 << graph.width(step + 1))[:, None]
            windows = oldest * graph.states(step + 1) + state
            levels = graph.levels[step % len(graph.widths)][windows]
            total = (y[step] - levels) ** 2
            total += costs[at][windows >> graph.width(step), columns]
            path[at] = windows[total.argmin(axis=0), columns]
            state = path[at] >> graph.width(step)
        return path


class _MxSearch:
    """The same search in mx."""

    def __init__(self, graph: TrellisGraph) -> None:
        self.graph = graph
        self.levels = mx.array(graph.levels)

    def search(self, y: mx.array) -> mx.array:
        """Windows (steps, N) of y (steps, N)."""
        steps, count = y.shape
        around, overlap = _overlap_steps(self.graph, steps)
        start = mx.zeros((self.graph.states(0), count))
        costs, final = self._forward(y, around, start)
        path = self._backward(y, around, costs, mx.argmin(final, axis=0))
        boundary_state = path[overlap] >> self.graph.width(0)
        states = mx.arange(self.graph.states(0))[:, None]
        start = mx.where(states == boundary_state, 0.0, float(_INFINITE_COST))
        once_round = list(range(steps))
        costs, _ = self._forward(y, once_round, start)
        return mx.stack(self._backward(y, once_round, costs, boundary_state))

    def _forward(
        self, y: mx.array, order: list[int], cost: mx.array
    ) -> tuple[list[mx.array], mx.array]:
        graph, count = self.graph, y.shape[1]
        costs = []
        for step in order:
            costs.append(cost)
            error = y[step] - self.levels[step % len(graph.widths), :, None]
            branch = (error * error).reshape(len(cost), -1, count) + cost[:, None]
            states = graph.states(step + 1)
            cost = mx.min(branch.reshape(-1, states, count), axis=0)
        return costs, cost

    def _backward(
        self, y: mx.array, order: list[int], costs: list[mx.array], state: mx.array
    ) -> list[mx.array]:
        graph = self.graph
        path = []
        for at in range(len(order) - 1, -1, -1):
            step = order[at]
            oldest = mx.arange(1 << graph.width(step + 1))[:, None]
            windows = oldest * graph.states(step + 1) + state
            error = y[step] - self.levels[step % len(graph.widths)][windows]
            before = mx.take_along_axis(costs[at], windows >> graph.width(step), axis=0)
            best = mx.argmin(error * error + before, axis=0, keepdims=True)
            window = mx.take_along_axis(windows, best, axis=0)[0]
            path.append(window)
            state = window >> graph.width(step)
        return path[::-1]

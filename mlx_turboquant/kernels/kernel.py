"""`Kernel`, an entry of a Metal source; `Launch`, its use; `Launcher`, what runs it.

Owns the binding to ``mx.fast.metal_kernel`` and ``mx.fast.cuda_kernel``. What is fixed
per model is a template argument; what changes per token is an input. Buffers are passed
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from . import source

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One entry of a Metal source; equal to itself only.

    Attributes:
        name: The name of its entry, ``TQ_ENTRY(name)``.
        file: The source in ``metal/`` that ends in the entry.
        inputs: Names of the input buffers, each of at least 8 elements: smaller ones
            would arrive in another address space. They arrive as they lie; entries
            that take slices use ``<name>_strides``.
        outputs: Names of the output buffers.
        arguments: The class of what the input ``arguments`` packs.
        omitted: Files left out although the source includes them.
    """

    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: type[NamedTuple]
    omitted: frozenset[str] = frozenset()

    def header(self, dialect: source.Dialect) -> str:
        """All of the source but the entry, with what it includes."""
        return source.header(self.file, dialect, self.arguments, self.omitted)

    def body(self, dialect: source.Dialect) -> str:
        """The entry's body; MLX writes the signature."""
        return source.body(self.file, self.name, dialect)


class Launch(NamedTuple):
    """All of a launch but its inputs: prepared once, reused every step.

    Attributes:
        kernel: What to run.
        template: Names and values, each an int, a bool or a dtype.
        grid: Threads, a multiple of ``threadgroup``.
        threadgroup: Threads of a threadgroup.
        output_shapes: One shape per output of the kernel.
        output_dtypes: One dtype per output of the kernel.
    """

    kernel: Kernel
    template: list[tuple[str, Any]]
    grid: Shape
    threadgroup: Shape
    output_shapes: list[Shape]
    output_dtypes: list[mx.Dtype]


class Launcher(Protocol):
    """Runs kernels somewhere."""

    @property
    def name(self) -> str:
        """What `explain` and errors call it."""
        ...

    def __call__(self, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
        """The kernel's outputs; ``inputs`` in its order."""
        ...


class MlxLauncher:
    """MLX's own custom kernels, on Metal or CUDA."""

    def __init__(self, name: source.Dialect) -> None:
        self.name = name
        self._built: dict[Kernel, Callable[..., list[mx.array]]] = {}

    def __call__(self, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
        """See `Launcher`. Does as little as it can: every layer pays for it."""
        kernel, template, grid, threadgroup, shapes, dtypes = launch
        try:
            run = self._built[kernel]
        except KeyError:
            run = self._built[kernel] = _build(kernel, self.name)
        return run(
            inputs=inputs,
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=shapes,
            output_dtypes=dtypes,
        )


def _build(kernel: Kernel, dialect: source.Dialect) -> Callable[..., list[mx.array]]:
    make: Any = mx.fast.metal_kernel if dialect == "metal" else mx.fast.cuda_kernel
    run: Callable[..., list[mx.array]] = make(
        name=f"tq_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body(dialect),
        header=kernel.header(dialect),
        ensure_row_contiguous=False,
    )
    return run

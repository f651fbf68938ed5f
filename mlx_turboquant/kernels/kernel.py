"""`Kernel`, a name and an entry call, and `Launcher`, what can run one.

Owns the binding to ``mx.fast.metal_kernel`` and ``mx.fast.cuda_kernel``. Fixed per
model is a template; what changes per token is an input. Buffers are passed whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from . import source

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One entry point of a Metal source.

    Attributes:
        name: Of the kernel.
        file: Its source in ``metal/``.
        inputs: Names of the input buffers, each of at least 8 elements: smaller ones
            would arrive in another address space. They arrive as they lie; entries
            that take slices use ``<name>_strides``.
        outputs: Names of the output buffers.
        entry: Body that declares threadgroup memory and makes one call.
    """

    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    entry: str


class Launcher(Protocol):
    """Runs kernels somewhere."""

    @property
    def name(self) -> str:
        """What `explain` and errors call it."""
        ...

    def __call__(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        template: Mapping[str, Any],
        grid: Shape,
        threadgroup: Shape,
        output_shapes: Sequence[Shape],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Launch whole threadgroups: ``grid`` is a multiple of ``threadgroup``."""
        ...


@dataclass(frozen=True)
class MlxLauncher:
    """MLX's own custom kernels, on Metal or CUDA."""

    name: source.Dialect

    def __call__(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array],
        template: Mapping[str, Any],
        grid: Shape,
        threadgroup: Shape,
        output_shapes: Sequence[Shape],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """See `Launcher`."""
        return list(
            _build(kernel, self.name)(
                inputs=list(inputs),
                template=list(template.items()),
                grid=grid,
                threadgroup=threadgroup,
                output_shapes=list(output_shapes),
                output_dtypes=list(output_dtypes),
            )
        )


@functools.cache
def _build(kernel: Kernel, dialect: source.Dialect) -> Callable[..., Any]:
    make: Any = mx.fast.metal_kernel if dialect == "metal" else mx.fast.cuda_kernel
    build: Callable[..., Any] = make(
        name=f"tq_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source.spell(kernel.entry, dialect),
        header=source.header(kernel.file, dialect),
        ensure_row_contiguous=False,
    )
    return build


from typing import NamedTuple


class Launch(NamedTuple):
    kernel: object
    template: list
    grid: tuple
    threadgroup: tuple
    output_shapes: list
    output_dtypes: list

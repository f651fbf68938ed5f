"""Integer arguments of a kernel: a `NamedTuple`, its MSL struct and its buffer.

Owns the order of the fields, which a struct, a loader and a packed array must agree on:
all three are made from the class. A buffer has one row of them, or one for each row of
a batch. A source gets struct and loader by including
``arguments.h``, which is no file; `kernels.source` puts `struct_text` there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..codecs.kernel_format import MIN_ELEMENTS


def struct_text(cls: type[NamedTuple]) -> str:
    """MSL of a struct with the class's name and fields, all int, and of its loader.

    >>> class Sizes(NamedTuple):
    ...     rows: int
    >>> print(struct_text(Sizes))
    struct Sizes {
      int rows;
    };
    TQ_FUNC Sizes load_arguments(const device int* arguments, uint row = 0u) {
      arguments += 8u * row;
      Sizes args;
      args.rows = arguments[0];
      return args;
    }
    <BLANKLINE>
    """
    name, fields = cls.__name__, cls._fields
    return "\n".join(
        [
            f"struct {name} {{",
            *[f"  int {field};" for field in fields],
            "};",
            f"TQ_FUNC {name} load_arguments("
            "const device int* arguments, uint row = 0u) {",
            f"  arguments += {_width(fields)}u * row;",
            f"  {name} args;",
            *[f"  args.{field} = arguments[{i}];" for i, field in enumerate(fields)],
            "  return args;",
            "}\n",
        ]
    )


@functools.lru_cache(maxsize=64)
def pack(*rows: tuple[int, ...]) -> mx.array:
    """Rows of ints, such as `NamedTuple`s, side by side in one int32 array, evaluated.

    A row has at least 8 elements, the last of them 0 where its fields are fewer.
    Memoised by value: all layers of a step share one array.
    """
    return mx.array([number for row in rows for number in _padded(row)], mx.int32)


@functools.lru_cache(maxsize=64)
def pack_bytes(numbers: bytes) -> mx.array:
    """int32 numbers as an array of at least 8, zeros behind them; memoised likewise."""
    array = np.frombuffer(numbers, np.int32)
    return mx.array(np.pad(array, (0, max(0, MIN_ELEMENTS - array.size))))


def pack_steps(
    rows: Sequence[tuple[int, ...]], growth: tuple[int, ...], first: int, count: int
) -> list[mx.array]:
    """`pack` of ``rows`` plus i times ``growth``, for ``count`` i from ``first`` on.

    For arguments that change from step to step, as views of one evaluated array: what
    the host writes into while a GPU reads beside it moves from one to the other and
    back. On an NVIDIA H100 a fresh array per step was seen to make that step's first
    launch wait 150 us.
    """
    start = np.array([_padded(row) for row in rows], np.int32)
    step = np.array(_padded(growth), np.int32)
    steps = np.arange(first, first + count, dtype=np.int32)[:, None, None]
    table = mx.array((start + steps * step).reshape(-1))
    # Not on the GPU's stream: views would wait for the step that it is at.
    with mx.stream(mx.cpu):
        views = list(mx.split(table, count))
        mx.eval(table, views)
    return views


def _width(fields: Sequence[object]) -> int:
    """Ints of a row in a buffer."""
    return max(MIN_ELEMENTS, len(fields))


def _padded(row: tuple[int, ...]) -> list[int]:
    return [*row, *[0] * (_width(row) - len(row))]

"""Integer arguments of a kernel: one `NamedTuple`, its MSL struct and its buffer.

Owns the order of the fields, which a struct, a loader and a packed array must agree on:
all three are made from the class. A source gets struct and loader by including
``arguments.h``, which is no file; `kernels.source` puts `struct_text` there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..codecs.kernel_format import MIN_ELEMENTS


def struct_text(cls: type[NamedTuple]) -> str:
    """MSL of a struct with the class's name and fields, all int, and of its loader.

    >>> class Sizes(NamedTuple):
    ...     rows: int
    >>> print(struct_text(Sizes))
    struct Sizes {
      int rows;
    };
    TQ_FUNC Sizes load_arguments(const device int* arguments) {
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
            f"TQ_FUNC {name} load_arguments(const device int* arguments) {{",
            f"  {name} args;",
            *[f"  args.{field} = arguments[{i}];" for i, field in enumerate(fields)],
            "  return args;",
            "}\n",
        ]
    )


@functools.lru_cache(maxsize=64)
def pack(arguments: tuple[int, ...]) -> mx.array:
    """A `NamedTuple` of ints as int32, in field order, evaluated.

    Memoised by value: all layers of a step share one array.
    """
    padding = [0] * (MIN_ELEMENTS - len(arguments))
    return mx.array([*arguments, *padding], dtype=mx.int32)


def pack_rows(rows: Sequence[tuple[int, ...]]) -> list[mx.array]:
    """`pack` of each of some `NamedTuple`s, as views of one evaluated array.

    For arguments that change from step to step: what the host writes into while a GPU
    reads beside it moves from one to the other and back. On an NVIDIA H100 a fresh
    array per step was seen to make that step's first launch wait 150 us.
    """
    width = max(MIN_ELEMENTS, len(rows[0]))
    padding = [0] * (width - len(rows[0]))
    table = mx.array([[*row, *padding] for row in rows], dtype=mx.int32)
    views = [table[i] for i in range(len(rows))]
    mx.eval(table, views)
    return views

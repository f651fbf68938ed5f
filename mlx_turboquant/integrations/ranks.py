"""Several machines, under ``mlx.launch``: which of them this is, and what was typed.

Rank 0 has the terminal. What it reads every rank needs, as all take every step
together.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.generate import generation_stream


def count() -> int:
    """How many ranks there are; 1 without ``mlx.launch``."""
    return int(mx.distributed.init().size())


def is_first() -> bool:
    """Whether this is the rank that has the terminal."""
    return bool(mx.distributed.init().rank() == 0)


def shared(text: str | None) -> str | None:
    """What rank 0 has read, on every rank; None for the end of input."""
    if count() == 1:
        return text
    # A step that mlx-lm began behind the last token exchanges its own sums meanwhile.
    mx.synchronize(generation_stream)
    data = b"" if text is None else text.encode(errors="surrogateescape")
    # 0 is the end: the empty text has length 1.
    length = _sum(mx.array([0 if text is None else len(data) + 1])).item()
    if not length:
        return None
    data = data.ljust(length - 1, b"\0")  # type: ignore[arg-type]
    codes = _sum(mx.array([*data, 0], mx.int32))
    return bytes(codes.tolist()[:-1]).decode(errors="surrogateescape")  # type: ignore[arg-type, index]


def _sum(values: mx.array) -> mx.array:
    return mx.distributed.all_sum(values.astype(mx.int32), stream=mx.cpu)

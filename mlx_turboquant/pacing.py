"""`pace`: a prompt's layers are computed one after the other, not all at once.

MLX computes when it is asked to, and gives memory back when a GPU has gone past it. A
prompt's chunk is asked for as a whole, so activations of all layers, and what their
codes are made from, would be held at once: gigabytes. So a layer that has packed a
chunk has its codes computed at once, and waits until the layer before it has its own.
Two layers are in flight: one that is computed, one that is being built. The same goes
for parts of one attention, where it has several: slices of heads, blocks of queries.

Between layers is also where a step can be given up: nothing else interrupts MLX.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

#: Tokens of a step from which on layers are paced: what shorter ones hold is little.
PACED_TOKENS = 256


class Interrupted(Exception):
    """A step was given up between two layers: caches of the first have seen it."""


class _Pacer(threading.local):
    """What was asked for last in this thread.

    Attributes:
        is_over: Whether steps of this thread are to be given up.
        latest: References that do not keep it: an array that somebody else holds is
            copied when it is written to.
    """

    is_over: Callable[[], bool] = staticmethod(lambda: False)
    latest: tuple[weakref.ref[mx.array], ...] = ()


_pacer = _Pacer()


def pace(arrays: Sequence[mx.array]) -> None:
    """Compute some arrays; wait for those of the call before.

    Args:
        arrays: What is stored of a layer's keys and values, or an attention's part.

    Raises:
        Interrupted: if this thread's steps are to be given up, see `give_up_when`.
    """
    if _pacer.is_over():
        raise Interrupted
    # Forgotten first: what cannot be waited for must not fail the next prompt, too.
    latest, _pacer.latest = _pacer.latest, ()
    try:
        cast(Any, mx.async_eval)(arrays)
    except ValueError as error:
        if "transformation" in str(error):
            return  # a prompt inside `mx.compile`: MLX wants its graph whole
        raise
    before = [array for ref in latest if (array := ref()) is not None]
    if before:
        mx.eval(before)
    _pacer.latest = tuple(weakref.ref(array) for array in arrays)


def give_up_when(is_over: Callable[[], bool]) -> None:
    """Let long steps of this thread end with `Interrupted` when ``is_over``."""
    _pacer.is_over = is_over

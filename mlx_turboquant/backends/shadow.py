"""The first real step of proved kernels, computed by the reference beside it.

A proof's tokens are made up; these are a user's. Once for each specialisation and
process, the first decode step that kernels prepare is computed twice, and compared in
the background. Kernels that are off there are not used any more.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from .call import AttendCall, BatchCall, Mask
from .decode_step import DecodeStep
from .gpu import Gpu
from .truth import ROW_TOLERANCE, TRUTH, attention_as_given, tolerance_of

#: Times the errors that made-up tokens may have: queries and keys of models can be
#: larger than those, and halves are coarser there.
_LENIENCE = 2


class Shadow:
    """Watches a backend of its own until the first step, then no more.

    Args:
        gpu: Whose kernels; it is left as it is.
        report: Told in words, on another thread, what is wrong with a step.

    Attributes:
        backend: The same, to be used in its place.
    """

    def __init__(self, gpu: Gpu, report: Callable[[str], None]) -> None:
        self.backend = copy.copy(gpu)
        self.backend.watch = self._see
        self._report = report
        self._thread: threading.Thread | None = None

    def wait(self) -> None:
        """Until a step that was seen is judged."""
        if self._thread is not None:
            self._thread.join()

    def _see(self, call: AttendCall | BatchCall, step: DecodeStep) -> None:
        """Have a step computed by both, of a batch its first row, and go on."""
        got = step(call)
        if isinstance(call, BatchCall):
            if isinstance(call.mask, mx.array) or call.keys.most_shown is not None:
                return  # the next step will do
            keys, values = (side.alone()[0] for side in (call.keys, call.values))
            call = AttendCall(call.q[:1], keys, values, *call[3:])
            got = got[:1]
        errors = _errors(call, got)
        try:
            cast(Any, mx.async_eval)(errors)
        except ValueError:
            return  # inside a transformation: no real step
        self.backend.watch = None
        # No daemon: a program that ends now waits for MLX to be done with it.
        self._thread = threading.Thread(
            target=self._judge, args=(errors, tolerance_of(call)), name="tq-shadow"
        )
        self._thread.start()

    def _judge(self, errors: mx.array, tolerance: float) -> None:
        numbers: Any = errors.tolist()
        of_all, of_row, is_known = numbers
        limits = _LENIENCE * tolerance, _LENIENCE * ROW_TOLERANCE
        if not is_known or (of_all < limits[0] and of_row < limits[1]):
            return
        # Every cache of this kind has this very backend: from here on the reference
        # attends for all of them, without a question at each step.
        vars(self.backend).update(
            attend=TRUTH.attend,
            attend_batch=TRUTH.attend_batch,
            dequantize=TRUTH.dequantize,
        )
        self._report(
            f"the first step: error {of_all:.2g} and {of_row:.2g} of a row, over "
            f"{limits[0]:g} or {limits[1]:g}"
        )


def _errors(call: AttendCall, got: mx.array) -> mx.array:
    """Relative error of all, the largest of a row, and whether the truth is finite."""
    want = attention_as_given(call, mx.default_device())
    distance = got.astype(mx.float32) - want
    squares, lost = (
        mx.sum(mx.where(_rows_that_see(call.mask), x * x, 0), axis=-1)
        for x in (want, distance)
    )
    total, tiny = mx.sum(squares), 1e-30
    of_all = mx.sqrt(mx.sum(lost) / (total + tiny))
    of_row = mx.sqrt(mx.max(lost / (squares + tiny)))
    is_known = mx.isfinite(total) & (total > 0)
    return mx.stack([of_all, of_row, is_known.astype(mx.float32)])


def _rows_that_see(mask: Mask) -> mx.array:
    """Query rows that see a token, as bools that broadcast to an output.

    Others, such as padding, are zeros of kernels and means of MLX's.
    """
    if not isinstance(mask, mx.array):
        return mx.array(True)
    if mask.dtype != mx.bool_:
        mask = mask > mx.finfo(mask.dtype).min / 2
    return mx.any(mask, axis=-1, keepdims=True)

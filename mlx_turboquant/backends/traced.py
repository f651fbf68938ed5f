"""`TracedGpu`: the GPU backend of one token's attention inside a trace.

`Gpu` chooses a `DecodeStep`'s arguments by the number of recent tokens. In a trace that
number is an array: the same graph serves each of them.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import UnsupportedModelError
from .call import AttendCall
from .decode_step import DecodeStep, kind_of

#: What to do about a step that cannot be traced; `UnsupportedModelError` wants a way
#: out.
EAGER = "its steps are taken one by one, without a trace"


class TracedGpu:
    """Attends by the steps that the token before has prepared.

    Args:
        recent: Number (1,) of recent tokens, int32.
    """

    def __init__(self, recent: mx.array) -> None:
        self._recent = recent

    def attend(self, call: AttendCall) -> mx.array:
        """As `Gpu.attend`, over handles whose buffers of recent tokens are whole.

        Raises:
            UnsupportedModelError: if the token before was attended in another way. A
                step that were prepared here would be computed again in every replay.
        """
        step: DecodeStep | None = call.keys.prepared.get(kind_of(call))
        if step is None or isinstance(call.mask, mx.array):
            raise UnsupportedModelError("its attention varies from step to step", EAGER)
        return step(call, step.arguments_at(self._recent))

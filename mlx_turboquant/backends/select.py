"""Which backend takes a call, and why another did not.

Owns the table of backends and the one environment variable, ``MLX_TQ_BACKEND``:
``reference``, or ``gpu`` to use kernels that await a first run and to make it an error
if they refuse a decode step over packed tokens. Nothing falls back silently: `explain`
shows what `choose` would say.
"""

from __future__ import annotations

import functools
import os
from typing import Protocol

import mlx.core as mx

from ..errors import BackendUnavailableError, SpecError
from ..kernels.kernel import MlxLauncher
from ..segments import Segments
from . import gpu, reference

VARIABLE = "MLX_TQ_BACKEND"
#: Launchers whose kernels are used unasked. The Metal ones have passed the simulator
#: and, as CUDA, a GPU, but no Mac yet.
TRUSTED = ("cuda",)


class Backend(Protocol):
    """Attention over segments in the rotated basis; see `reference.attend_rot`."""

    @property
    def name(self) -> str:
        """What `explain` calls it."""
        ...

    def attend_rot(
        self,
        q_rot: mx.array,
        keys: Segments,
        values: Segments,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As `reference.attend_rot`."""
        ...


class Reference:
    """`reference` as a `Backend`; takes every call."""

    name = "reference"
    attend_rot = staticmethod(reference.attend_rot)


REFERENCE = Reference()


@functools.cache
def gpu_backend() -> gpu.Gpu | None:
    """Kernels on this machine's GPU, or None if MLX has none to run them on."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return None
    if mx.metal.is_available():
        return gpu.Gpu(MlxLauncher("metal"))
    if mx.cuda.is_available():
        return gpu.Gpu(MlxLauncher("cuda"))
    return None


def choose(steps: int, keys: Segments, values: Segments) -> tuple[Backend, str | None]:
    """The backend for ``steps`` query rows, and why it is not the GPU's, if so.

    Raises:
        BackendUnavailableError: if ``MLX_TQ_BACKEND=gpu`` and the GPU's refuses.
        SpecError: if the variable has another value.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "gpu", "reference"):
        raise SpecError(f"{VARIABLE}={wanted!r} is unknown; use 'gpu' or 'reference'")
    if wanted == "reference":
        return REFERENCE, f"{VARIABLE} is set"
    backend = gpu_backend()
    if backend is None:
        reason: str | None = "MLX runs on the CPU here"
    elif wanted != "gpu" and backend.name not in TRUSTED:
        reason = f"{backend.name} kernels await a first run; try {VARIABLE}=gpu"
    else:
        reason = gpu.refuse(steps, keys, values)
    if backend is not None and reason is None:
        return backend, None
    # Prefill and short caches are the reference's own work on every machine.
    if wanted == "gpu" and (
        backend is None or (keys.packed is not None and steps <= gpu.MAX_ROWS)
    ):
        raise BackendUnavailableError(
            f"the GPU backend cannot take this call: {reason}",
            f"unset {VARIABLE} to use the reference backend",
        )
    return REFERENCE, reason

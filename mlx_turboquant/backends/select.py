"""Which backend takes a call, and why another did not.

Owns the table of backends and the one environment variable, ``MLX_TQ_BACKEND``:
``reference``, or ``gpu`` to use kernels that await a first run and to make it an error
if they refuse a decode step over packed tokens. Nothing falls back silently: `explain`
shows what `choose` would say.
"""

from __future__ import annotations

import functools
import os
from typing import NoReturn, Protocol

import mlx.core as mx

from ..codecs import Codec
from ..errors import BackendUnavailableError, SpecError
from ..kernels.kernel import MlxLauncher
from ..segments import CompressedTokens
from ..tokens import TokenArrays
from ..transform import ChannelTransform, PageMeans
from . import cpu, gpu, reference

VARIABLE = "MLX_TQ_BACKEND"
#: Launchers whose kernels are used unasked. The Metal ones have passed the simulator
#: and, as CUDA, a GPU, but no Mac yet.
TRUSTED = ("cuda",)


class Backend(Protocol):
    """What a machine does with compressed tokens; defined by `reference`."""

    @property
    def name(self) -> str:
        """What `explain` calls it."""
        ...

    def attend(
        self,
        q: mx.array,
        keys: CompressedTokens,
        values: CompressedTokens,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """As `reference.attend`."""
        ...

    def decode(self, side: CompressedTokens, heads: slice, dtype: mx.Dtype) -> mx.array:
        """As `reference.decode`."""
        ...

    def encode(
        self,
        keys: mx.array,
        values: mx.array,
        means: PageMeans | None,
        first: int,
        bases: tuple[ChannelTransform, ChannelTransform],
        codecs: tuple[Codec, Codec],
    ) -> tuple[TokenArrays, TokenArrays]:
        """As `reference.encode`."""
        ...


class Reference:
    """`reference` as a `Backend`; takes every call."""

    name = "reference"
    attend = staticmethod(reference.attend)
    decode = staticmethod(reference.decode)
    encode = staticmethod(reference.encode)


REFERENCE = Reference()
CPU = cpu.Cpu()


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


def machine_backend() -> tuple[Backend, str | None]:
    """The backend of this machine's device, and why it is not that, if so.

    Raises:
        BackendUnavailableError: if ``MLX_TQ_BACKEND=gpu`` and there is no GPU.
        SpecError: if the variable has another value.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "gpu", "reference"):
        raise SpecError(f"{VARIABLE}={wanted!r} is unknown; use 'gpu' or 'reference'")
    if wanted == "reference":
        return REFERENCE, f"{VARIABLE} is set"
    backend = gpu_backend()
    if backend is None:
        if wanted == "gpu":
            _unavailable("MLX runs on the CPU here")
        return CPU, None
    if wanted != "gpu" and backend.name not in TRUSTED:
        return (
            REFERENCE,
            f"{backend.name} kernels await a first run; try {VARIABLE}=gpu",
        )
    return backend, None


def choose(
    keys: CompressedTokens, values: CompressedTokens
) -> tuple[Backend, str | None]:
    """The backend for attention over these, and why it is not the device's, if so.

    Raises:
        BackendUnavailableError: if ``MLX_TQ_BACKEND=gpu`` and it refuses the codes.
        SpecError: if the variable has another value.
    """
    backend, reason = machine_backend()
    if backend is REFERENCE:
        return backend, reason
    refuse = cpu.refuse if backend is CPU else gpu.refuse
    reason = refuse(keys, values)
    if reason is None:
        return backend, None
    # A cache with nothing packed yet is the reference's own work on every machine.
    if os.environ.get(VARIABLE) == "gpu" and keys.packed is not None:
        _unavailable(reason)
    return REFERENCE, reason


def _unavailable(reason: str) -> NoReturn:
    raise BackendUnavailableError(
        f"the GPU backend cannot take this call: {reason}",
        f"unset {VARIABLE} to use the reference backend",
    )

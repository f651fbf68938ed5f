"""Which backend serves a cache, and why a faster one does not.

Backends are tried in the order of `table`, once per cache, when its codecs are final.
Kernels that nobody could try beforehand are used once they are proved on this machine.
The one environment variable, ``MLX_TQ_BACKEND``, is read once per process:
``reference``, or ``gpu`` to use kernels without proof and to make it an error if they
refuse a cache. Nothing falls back silently: `explain` shows the reasons.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import mlx.core as mx

from ..errors import BackendUnavailableError, SpecError
from ..kernels.kernel import MlxLauncher
from ..quantizer import Quantizer
from . import proved
from .cpu import Cpu
from .gpu import Gpu
from .reference import Reference

VARIABLE = "MLX_TQ_BACKEND"
#: Kernels that are used unasked.
DEFAULT_ON = ("cuda", "metal")
#: Those of them that must be proved on the machine first. The Metal ones have passed
#: the simulator and, as CUDA, a GPU, but we have no Mac to run them on.
NEED_PROOF = ("metal",)


class Choice(NamedTuple):
    """A backend, and why.

    Attributes:
        backend: What attends and encodes.
        reason: Why none before it in the table was taken, or "".
        proof: Digest of the verdict that its kernels are used by; "" if they need none.
        tuned: What a tuner changed of their launches, in words; "" for nothing.
    """

    backend: Reference
    reason: str = ""
    proof: str = ""
    tuned: str = ""


@functools.cache
def requested() -> str:
    """The value of ``MLX_TQ_BACKEND``: ``""``, ``"gpu"`` or ``"reference"``.

    Raises:
        SpecError: if the variable has another value.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "gpu", "reference"):
        raise SpecError(f"{VARIABLE}={wanted!r} is unknown; use 'gpu' or 'reference'")
    return wanted


@functools.cache
def gpu_backend() -> Gpu | None:
    """Kernels on this machine's GPU, or None if MLX has none to run them on."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return None
    if mx.metal.is_available():
        return Gpu(MlxLauncher("metal"))
    if mx.cuda.is_available():
        return Gpu(MlxLauncher("cuda"))
    return None


@functools.cache
def _cpu_backend() -> Cpu:
    return Cpu()


@functools.cache
def reference_backend() -> Reference:
    """Plain MLX operations, which take every call."""
    return Reference()


def table() -> list[tuple[Reference, str]]:
    """Backends of MLX's default device, the fastest first.

    Each comes with why it is left out for every cache; "" if it is not.

    Raises:
        BackendUnavailableError: if ``MLX_TQ_BACKEND=gpu`` and there is no GPU.
        SpecError: if the variable has another value.
    """
    wanted = requested()
    gpu = gpu_backend()
    if gpu is None and wanted == "gpu":
        raise _unavailable("MLX runs on the CPU here")
    off = f"{VARIABLE} is set" if wanted == "reference" else ""
    if gpu is not None and not wanted and gpu.name not in DEFAULT_ON:
        off = f"{gpu.name} kernels are off; try {VARIABLE}=gpu"
    first = _cpu_backend() if gpu is None else gpu
    return [(first, off), (reference_backend(), "")]


def resolve(keys: Quantizer, values: Quantizer, dtype: mx.Dtype) -> Choice:
    """The first backend that takes what these quantizers encode.

    If its kernels are not proved yet, that is begun, and another backend is chosen.

    Args:
        keys: Of a layer's keys.
        values: Of its values.
        dtype: The model's.

    Raises:
        BackendUnavailableError: if ``MLX_TQ_BACKEND=gpu`` and the kernels refuse it.
        SpecError: if the variable has another value.
    """
    reasons: list[str] = []
    for backend, off in table():
        reason = off or backend.refuse(keys, values)
        if reason is None and isinstance(backend, Gpu) and awaits_proof():
            answer = proved.ask(backend, keys, values, dtype)
            if not isinstance(answer, str):
                return Choice(answer.backend, "", answer.digest, answer.tuned)
            reason = answer
        if reason is None:
            tuned = ""
            if isinstance(backend, Gpu) and not requested():
                backend, tuned = proved.tuned(backend, keys, values, dtype)
            return Choice(backend, "; ".join(reasons), tuned=tuned)
        if requested() == "gpu" and backend is gpu_backend():
            raise _unavailable(reason)
        reasons.append(reason)
    raise AssertionError("the reference takes every call")


def awaits_proof() -> bool:
    """Whether this machine's kernels are used only where they are proved."""
    gpu = gpu_backend()
    return gpu is not None and not requested() and gpu.name in NEED_PROOF


def _unavailable(reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"the GPU backend cannot take this call: {reason}",
        f"unset {VARIABLE} to use the reference backend",
    )

"""Launch geometry: how many simdgroups fill a machine, and how they share the tokens.

A decode step is serial: its attention has the whole GPU for as long as it runs, so a
launch should fill every core once (a *wave*), and no threadgroup should get so few
tokens that its start and the merge of its result cost more than they save.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess

import mlx.core as mx

#: Simdgroups of the attention kernel that a core (a multiprocessor) takes. CUDA's is
#: measured: of 8 and 16 on an H100, 8 are 12% faster at 131,072 tokens (dev/LOG.md).
#: Metal's is what 208 kB of registers hold at 128 a thread; no Mac has been measured.
_PER_CORE = {"cuda": 8, "metal": 12}
#: Taken where the machine does not say how many cores it has, by the last letter of an
#: Apple GPU's architecture: a base chip, a Pro or Max, an Ultra.
_APPLE_CORES = {"g": 8, "s": 20, "d": 60}
#: For launchers that are no machine, such as a simulator.
_UNKNOWN = 512
#: Packed tokens that a split (a threadgroup) has at least; the last may have fewer.
MIN_TOKENS_PER_SPLIT = 256
_CU_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


@functools.cache
def machine_simdgroups(dialect: str) -> int:
    """How many simdgroups of the attention kernel fill the GPU of a launcher."""
    if dialect not in _PER_CORE:
        return _UNKNOWN
    cores = _cuda_cores() if dialect == "cuda" else _apple_cores()
    return cores * _PER_CORE[dialect] if cores else _UNKNOWN


def tokens_per_split(packed: int, share: int, sharers: int, threadgroups: int) -> int:
    """Packed tokens that each threadgroup attends to, a multiple of ``share``.

    Args:
        packed: Tokens to divide.
        share: Tokens that a threadgroup takes at once.
        sharers: Threadgroups that take the same tokens: one for each row of the batch,
            KV head and tile of query rows.
        threadgroups: How many fill the machine.
    """
    shares = -(-packed // share)
    enough = -(-packed // MIN_TOKENS_PER_SPLIT)
    splits = max(1, min(threadgroups // sharers, enough))
    return -(-shares // splits) * share


def _cuda_cores() -> int:
    """Multiprocessors of the first GPU, as NVIDIA's driver says; 0 without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count, device = ctypes.c_int(0), ctypes.c_int(0)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(
            ctypes.byref(count), _CU_MULTIPROCESSOR_COUNT, device
        )
    )
    return 0 if failed else count.value


def _apple_cores() -> int:
    """GPU cores as IOKit's registry says, or as such chips have at least."""
    try:
        registry = subprocess.run(
            ["ioreg", "-rc", "AGXAccelerator", "-d1"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        registry = ""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', registry)
    if found:
        return int(found[1])
    architecture = str(mx.device_info().get("architecture", ""))
    return _APPLE_CORES.get(architecture[-1:], 0)

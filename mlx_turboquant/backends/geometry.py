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

from ..kernels.tuning import UNTUNED, Tuning

#: Simdgroups of the attention kernel that a core (a multiprocessor) takes. CUDA's is
#: measured: of 8, 12, 16 and 20 on an H100, 16 are fastest at 131,072 tokens, by 11%
#: against 8 (dev/LOG.md). Metal's is what 208 kB of registers hold at 128 a thread; no
#: Mac has been measured.
_PER_CORE = {"cuda": 16, "metal": 12}
#: Taken where the machine does not say how many cores it has, by the last letter of an
#: Apple GPU's architecture: a base chip, a Pro or Max, an Ultra.
_APPLE_CORES = {"g": 8, "s": 20, "d": 60}
#: For launchers that are no machine, such as a simulator.
_UNKNOWN = 512
#: Packed tokens that a split (a threadgroup) has at least, but for the last: while they
#: fill less than half of the machine, and to fill it whole. More splits mean a longer
#: merge; below half, more of them also mean more cores.
_TOKENS_OF_A_FEW, _TOKENS_OF_MANY = 256, 1024
_CU_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


@functools.cache
def machine_simdgroups(dialect: str) -> int:
    """How many simdgroups of the attention kernel fill the GPU of a launcher."""
    if dialect not in _PER_CORE:
        return _UNKNOWN
    cores = _cuda_cores() if dialect == "cuda" else _apple_cores()
    return cores * _PER_CORE[dialect] if cores else _UNKNOWN


def tokens_per_split(
    packed: int,
    share: int,
    sharers: int,
    threadgroups: int,
    most: int | None = None,
    tuning: Tuning = UNTUNED,
) -> int:
    """Packed tokens that each threadgroup attends to, a multiple of ``share``.

    Args:
        packed: Tokens to divide.
        share: Tokens that a threadgroup takes at once.
        sharers: Threadgroups that take the same tokens: one for each row of the batch,
            KV head and tile of query rows.
        threadgroups: How many fill the machine.
        most: Tokens that a threadgroup can take; None for any number.
        tuning: What is known better of this machine.
    """
    shares = -(-packed // share)
    most_splits = int(threadgroups * (tuning.fill or 1)) // sharers
    least_of_a_few = tuning.few_tokens or _TOKENS_OF_A_FEW
    few = min(-(-packed // least_of_a_few), most_splits // 2)
    many = min(packed // (tuning.many_tokens or _TOKENS_OF_MANY), most_splits)
    splits = max(1, few, many)
    tokens = -(-shares // splits) * share
    return tokens if most is None else max(share, min(tokens, most // share * share))


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

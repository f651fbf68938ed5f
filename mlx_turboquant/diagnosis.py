"""What ``mlx_tq.doctor`` finds out: the machine, every kernel, one timing.

Owns the cases that a first run on a new machine should cover. A kernel is right if it
agrees with the reference backend; a timing is a median and says what it compares.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx
import numpy as np

from .attention import attend
from .backends import select
from .backends.call import AttendCall
from .backends.reference import Reference
from .cache import TurboQuantCache
from .cache.quantizers import quantizers_of
from .quantizer import PageMeans, Quantizer
from .segments import CompressedTokens
from .spec import CacheSpec
from .version import __version__

#: Half arithmetic and polynomial levels differ from the definition by this much.
TOLERANCE = 5e-3
#: Tokens that the encoding kernels are checked on: a page of the specs below.
_PAGE = 128
#: spec, key dim, value dim, query heads per KV head, query rows, mask.
CASES: tuple[tuple[str, int, int, int, int, str | None], ...] = (
    ("k3v3", 128, 128, 4, 1, None),
    ("k4v3", 64, 64, 2, 1, None),
    ("k2v2", 80, 80, 1, 1, None),
    ("k5v4", 96, 96, 3, 4, "causal"),
    ("k8v6", 192, 128, 2, 2, "causal"),
    ("k1v7", 256, 256, 1, 8, "causal"),
    ("k3v3", 512, 512, 2, 1, None),
)


@dataclass(frozen=True)
class KernelCheck:
    """One case run on kernels: its name, its error, or why it could not run."""

    name: str
    error: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and agrees with the reference."""
        return not self.failure and self.error < TOLERANCE


def machine() -> dict[str, str]:
    """Names and versions that a report about this package should carry."""
    info = mx.device_info()
    return {
        "mlx-tq": __version__,
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{mx.default_device()} {info.get('device_name', '')}".strip(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def check_kernels(backend: Reference, tokens: int = 700) -> Iterator[KernelCheck]:
    """Run every kernel over `CASES`, each against the reference backend."""
    for spec, k_dim, v_dim, group, rows, mask in CASES:
        keys, values = _compressed(spec, 2, tokens, k_dim, v_dim)
        scale = k_dim**-0.5
        step = mx.random.normal((1, 2 * group, rows, k_dim)).astype(mx.float16)
        chunk = mx.random.normal((1, 2 * group, 9, k_dim)).astype(mx.float16)
        shape = f"{spec} dims {k_dim}/{v_dim}"
        work: dict[str, Work] = {
            f"attention {shape} group {group} rows {rows}": partial(
                _attention, AttendCall(step, keys, values, scale, mask)
            ),
            f"prefill {shape}": partial(
                _attention, AttendCall(chunk, keys, values, scale, "causal")
            ),
            f"encode {shape}": partial(
                _round_trip,
                [(side.quantizer, _page_for(side)) for side in (keys, values)],
            ),
        }
        for name, run in work.items():
            yield _check(name, run, backend)


def begin_proofs() -> None:
    """Have the kernels of every case checked where that is needed and not known."""
    for spec, k_dim, v_dim, *_ in CASES:
        sides = quantizers_of(CacheSpec.parse(spec), (k_dim, v_dim), mx.float16)
        select.resolve(*sides, mx.float16)


Work = Callable[[Reference], Sequence[mx.array]]


def _attention(call: AttendCall, backend: Reference) -> list[mx.array]:
    return [backend.attend(call)]


def _page_for(side: CompressedTokens) -> mx.array:
    """A page of vectors (1, H, page, D) for a side's quantizer."""
    batch, heads, _, dim = side.shape
    x = mx.random.normal((batch, heads, _PAGE, dim)).astype(side.dtype)
    mx.eval(x)
    return x


def _round_trip(
    sides: Sequence[tuple[Quantizer, mx.array]], backend: Reference
) -> list[mx.array]:
    """What decoding gives of a page's codes: the codes may differ by ties."""
    decoded = []
    for quantizer, x in sides:
        means = None if quantizer.means is None else PageMeans(quantizer.means.page)
        fresh = replace(quantizer, means=means)
        decoded.append(fresh.decode_rot(backend.encode(fresh, x, 0)))
    return decoded


def _check(name: str, run: Work, backend: Reference) -> KernelCheck:
    try:
        got = list(run(backend))
        mx.eval(got)
    except Exception as problem:  # a compiler's message, whatever its type
        return KernelCheck(name, float("nan"), str(problem).strip())
    errors = []
    for a, b in zip(got, run(select.reference_backend()), strict=True):
        wide = np.array(b.astype(mx.float32), dtype=np.float64)
        distance = np.array(a.astype(mx.float32)) - wide
        errors.append(float(np.linalg.norm(distance) / np.linalg.norm(wide)))
    return KernelCheck(name, max(errors))


def _compressed(
    spec: str, heads: int, tokens: int, k_dim: int, v_dim: int
) -> tuple[CompressedTokens, CompressedTokens]:
    """Handles over ``tokens`` random tokens and one of zeros."""
    cache = TurboQuantCache(spec)
    for start in range(0, tokens, 8192):
        count = min(8192, tokens - start)
        k = mx.random.normal((1, heads, count, k_dim)).astype(mx.float16)
        v = mx.random.normal((1, heads, count, v_dim)).astype(mx.float16)
        cache.update_and_fetch(k, v)
        mx.eval(cache.state)
    last = (mx.zeros((1, heads, 1, dim), mx.float16) for dim in (k_dim, v_dim))
    cache.update_and_fetch(*last)  # what is due is packed before it
    return cache.compressed()


def time_decode(tokens: int, repeats: int = 9) -> dict[str, float]:
    """Milliseconds of one decode attention, by what computes it.

    32 query heads, 8 KV heads, head_dim 128, fp16, k3v3; medians, host included.
    """
    keys, values = _compressed("k3v3", 8, tokens, 128, 128)
    plain = mx.random.normal((2, 1, 8, tokens, 128)).astype(mx.float16)
    mx.eval(plain)
    backend = select.resolve(keys.quantizer, values.quantizer, keys.dtype).backend
    return {
        "fp16": _median_ms(lambda q: attend(q, plain[0], plain[1], 0.09), repeats),
        f"k3v3 on {backend.name}": _median_ms(
            lambda q: attend(q, keys, values, 0.09), repeats
        ),
    }


def _median_ms(call: Callable[[mx.array], mx.array], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        q = mx.random.normal((1, 32, 1, 128)).astype(mx.float16)
        mx.eval(q)
        start = time.perf_counter()
        mx.eval(call(q))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])

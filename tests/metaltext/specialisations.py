"""Which specialisations of our kernels there are: those that caches launch, noted.

Caches are fed zeros on a backend whose launcher computes nothing. What varies is
derived from the registry and the tests' matrix (`cases`); everything else a template
has, `backends` chooses. Owns no text (`texts`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
from cases import DIMS
from helpers import attend, backend

import mlx_turboquant as tq
from mlx_turboquant.attention import dequantize
from mlx_turboquant.backends.gpu import MAX_STEP, Gpu
from mlx_turboquant.backends.specialize import MAX_DIM
from mlx_turboquant.codecs import codec_names
from mlx_turboquant.codecs.registry import codec_info
from mlx_turboquant.kernels.kernel import Kernel
from mlx_turboquant.kernels.tuning import UNTUNED, Tuning
from mlx_turboquant.proof.facts import facts

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
#: The matrix's, and those of models beyond it.
HEAD_DIMS = (*(dim for dim in DIMS if dim >= 32), 192, MAX_DIM)
_DEFAULT, _TRELLIS = "k3v3", "k3v2.5,codec=trellis"
#: Options that change a template, and codecs that differ between sides.
_OPTIONS = (
    "k3v3,center=off",
    "k3v3,equalize=off",
    "k3v3,sink=0,window=0",
    "k4v2",
    "k8v6",
    "k3v4,codec=trellis/rotated-int4",
    "k2.5v4,codec=research.turboangle-fixed",
    "k3.5v3,codec=research.turboangle",
)
_PAGE = 128


@dataclass(frozen=True)
class Buffer:
    """What MLX's signature says of an input: dtype, number of dimensions, elements."""

    dtype: str
    ndim: int
    size: int


@dataclass(frozen=True)
class Specialisation:
    """A kernel for one template and kind of inputs."""

    kernel: Kernel
    template: tuple[tuple[str, object], ...]
    inputs: tuple[Buffer, ...]
    outputs: tuple[mx.Dtype, ...]

    @property
    def name(self) -> str:
        """The kernel and its template, for people."""
        values = " ".join(f"{key}={_shown(value)}" for key, value in self.template)
        return f"{self.kernel.name} {values}"


def _shown(value: object) -> object:
    return str(value).rsplit(".")[-1] if isinstance(value, mx.Dtype) else value


class Noted:
    """A launcher that notes what it is to run, and gives zeros."""

    def __init__(self) -> None:
        self.name = "metal"
        #: In the order of launches.
        self.found: dict[Specialisation, None] = {}

    def __call__(self, launch, inputs):
        kernel, template, _, _, shapes, dtypes = launch
        buffers = tuple(
            Buffer(str(x.dtype).rsplit(".")[-1], x.ndim, min(x.size, 8)) for x in inputs
        )
        made = Specialisation(kernel, tuple(template), buffers, tuple(dtypes))
        self.found.setdefault(made, None)
        return [
            mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        ]


@dataclass(frozen=True)
class Case:
    """A cache, and the steps it is asked for.

    Attributes:
        spec: The cache's.
        dims: Elements of a key and of a value.
        dtype: Of the model.
        rows: (query heads a KV head, tokens of a step) of each step.
        masks: Of each step: None, "causal" or "array".
        sinks: Whether the model has learned sink logits, too.
        tuning: As `Gpu` takes it.
    """

    spec: str
    dims: tuple[int, int] = (128, 128)
    dtype: mx.Dtype = mx.float16
    rows: tuple[tuple[int, int], ...] = ((1, 1), (4, 1), (8, 1))
    masks: tuple[str | None, ...] = (None,)
    sinks: bool = False
    tuning: Tuning = UNTUNED


def cases() -> Iterator[Case]:
    """Every codec by width, every head_dim, dtype, number of rows and option."""
    for name in codec_names():
        info = codec_info(name)
        for width in info.widths:
            yield Case(f"k{width:g}v{width:g},codec={name}")
    for dim, spec in itertools.product(HEAD_DIMS, (_DEFAULT, _TRELLIS)):
        yield Case(spec, (dim, dim), rows=((1, 1), (4, 1), (8, 2)))
    yield Case(_DEFAULT, (192, 128))
    for dtype in DTYPES:
        for tuning in (UNTUNED, Tuning(fma_rows=0)):
            yield Case(
                _DEFAULT,
                dtype=dtype,
                rows=((1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (4, MAX_STEP)),
                masks=(None, "causal", "array"),
                sinks=True,
                tuning=tuning,
            )
    for spec in _OPTIONS:
        yield Case(spec)


def specialisations() -> list[Specialisation]:
    """All of them, each once, in the order of `cases`, and the probe of proofs."""
    launcher = Noted()
    for case in cases():
        with backend(Gpu(launcher, tuning=case.tuning)):
            _use(case)
    facts(launcher)
    return list(launcher.found)


def _use(case: Case) -> None:
    """A prompt in two chunks, steps, and what is left without its recent tokens."""
    cache = tq.TurboQuantCache(f"{case.spec},page={_PAGE}")
    heads = 2
    for count in (3 * _PAGE, 2 * _PAGE, 1):
        keys, values = (mx.ones((1, heads, count, d), case.dtype) for d in case.dims)
        q = mx.ones((1, heads, count, case.dims[0]), case.dtype)
        mask = "causal" if count > 1 else None
        attend(q, *cache.update_and_fetch(keys, values), 0.1, mask)
    sides = cache.compressed()
    total = sides[0].stored_length
    for (group, steps), mask in itertools.product(case.rows, case.masks):
        shape = (1, heads * group, steps, case.dims[0])
        shown = mx.zeros((steps, total)) if mask == "array" else mask
        for sinks in (None, mx.zeros((heads * group,))) if case.sinks else (None,):
            q = mx.ones(shape, case.dtype)
            attend(q, *sides, 0.1, shown, sinks)
    dequantize(*sides)
    cache.trim(sides[0].recent_length)
    sides = cache.compressed()
    for steps in (1, MAX_STEP + 1):
        attend(mx.ones((1, heads, steps, case.dims[0]), case.dtype), *sides, 0.1)
    dequantize(*sides)

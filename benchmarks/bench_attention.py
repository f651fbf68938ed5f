"""One decode attention over a long cache, as a step waits for it.

By default Llama-3.1-8B's shape (32 query heads, 8 KV heads, head_dim 128) and one query
token, on whatever GPU MLX finds: MLX's fp16 attention, mlx-lm's 4 bits and ours, each
codec first checked against the reference backend. A step is serial, so attention is
timed alone:

    kernels     microseconds of each kernel of one call, by Nsight Compute, where it is
                (NVIDIA): the script runs itself under ``ncu``. The least of three calls
                (one cache again and again: up to some 50 MB of it stay in an H100's L2,
                which in a step the weights pass through)
    dependent   microseconds a call when each call's output is the next one's query:
                with what the host and the launches cost
    together    independent calls in one evaluation, which a GPU runs side by side: a
                throughput, only with ``--throughput``

    python benchmarks/bench_attention.py [LENGTH ...] [--specs SPEC ...] [--throughput]
        [--kv-heads 8] [--group 4] [--dim 128] [--steps 1] [--batch 1]
        [--dtype float16] [--[no-]multiply-adds]

A batch is of sequences as long as each other, whose codes lie in one pool of pages in
no order.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import mlx_turboquant as tq
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.batch_handles import CompressedBatch
from mlx_turboquant.codecs import Codec, codec_for
from mlx_turboquant.codecs.base import Side
from mlx_turboquant.kernels.kernel import MlxLauncher
from mlx_turboquant.kernels.tuning import UNTUNED, Tuning
from mlx_turboquant.quantizer import PageMeans, Quantizer
from mlx_turboquant.segments import CompressedTokens, PreparedSteps
from mlx_turboquant.tiles import in_tiles, tile_layout
from mlx_turboquant.tokens import TILE, Places, TokenArrays
from mlx_turboquant.transform import ChannelTransform

CALLS, REPEATS = 64, 7
LENGTHS = (1024, 4096, 8192, 32768, 131072, 524288)
SPECS = (
    "k2v2",
    "k3v3",
    "k4v4",
    "k8v8",
    "k4v4,codec=rotated-int4",
    "k3v3,codec=trellis",
)
#: mlx-lm's 4 bits take milliseconds beyond this.
_AFFINE_UP_TO = 131072
#: Tokens that are encoded; longer caches repeat them.
_DISTINCT = 4096
Attention = Callable[[mx.array], mx.array]
Handle = CompressedTokens | CompressedBatch


class Shape(NamedTuple):
    """Of the attention that is timed."""

    kv_heads: int = 8
    #: Query heads to a KV head.
    group: int = 4
    dim: int = 128
    #: Query tokens.
    steps: int = 1
    #: Sequences.
    batch: int = 1
    dtype: str = "float16"

    @property
    def mx_dtype(self) -> mx.Dtype:
        """Of queries and of what is not packed."""
        dtype: mx.Dtype = getattr(mx, self.dtype)
        return dtype


LLAMA = Shape()


class _Pooled(TokenArrays):
    """Codes whose tiles lie anywhere."""

    __slots__ = ("places",)

    @property
    def tiles(self) -> Places:
        """Where each is."""
        return np.array(self.places, np.int32)


def made_up(
    spec: str, length: int | Sequence[int], shape: Shape = LLAMA
) -> tuple[Handle, Handle]:
    """Handles over random tokens: 4 in the sink, 64 recent, ``length`` packed.

    Or as many as each row of a batch has.
    """
    lengths = [length] * shape.batch if isinstance(length, int) else list(length)
    length = max(lengths)
    parsed = tq.CacheSpec.parse(spec)
    page_tiles, pages = parsed.page // TILE, -(-length // parsed.page)
    order = list(range(shape.batch * pages))
    if shape.batch > 1:
        random.Random(0).shuffle(order)
    handles: list[Handle] = []
    prepared = PreparedSteps()
    of_sides: tuple[tuple[Side, tq.CodecSpec], ...]
    of_sides = (("keys", parsed.keys), ("values", parsed.values))
    for side, codec_spec in of_sides:
        codec = codec_for(codec_spec, shape.dim, side, 0)
        arrays = _codes(codec, side, len(order) * page_tiles, shape)
        means = None
        if side == "keys":
            means = PageMeans(parsed.page)
            whole = (1, shape.kv_heads, len(order), shape.dim)
            means.append(mx.random.normal(whole))
            mx.eval(means.state)
        recent = _plain(64, shape)
        rows = []
        for row in range(shape.batch):
            gains = mx.exp(mx.random.normal((1, shape.kv_heads, 1, shape.dim)) / 2)
            transform = ChannelTransform(codec.rotation, gains)
            sink = _plain(4, shape)[:1]
            mx.eval(sink, transform.signs_times_gains)
            codes = _Pooled(arrays, lengths[row], layout=tile_layout(codec, side))
            own = order[row * pages : (row + 1) * pages]
            tiles = [page * page_tiles + i for page in own for i in range(page_tiles)]
            codes.places = tuple(tiles[: -(-lengths[row] // TILE)])
            quantizer = Quantizer(codec, transform, side, means)
            last = recent[row : row + 1]
            rows.append(
                CompressedTokens(quantizer, sink, codes, last, 64, prepared=prepared)
            )
        if shape.batch == 1:
            handles.append(rows[0])
        else:
            firsts = [0] * shape.batch
            handles.append(CompressedBatch(rows, recent, firsts, 64, None, prepared))
    return handles[0], handles[1]


def _codes(codec: Codec, side: Side, tiles: int, shape: Shape) -> dict[str, mx.array]:
    """Words and scales of so many tiles."""
    x = mx.random.normal((1, shape.kv_heads, _DISTINCT, shape.dim))
    some = in_tiles(codec.encode(x), tile_layout(codec, side)).arrays
    times = -(-tiles * TILE // _DISTINCT)
    arrays = {
        name: mx.contiguous(mx.tile(array, (1, 1, times, 1))[:, :, :tiles])
        for name, array in some.items()
    }
    mx.eval(arrays)
    return arrays


def _plain(tokens: int, shape: Shape) -> mx.array:
    """So many random tokens of every sequence."""
    whole = (shape.batch, shape.kv_heads, tokens, shape.dim)
    x = mx.random.normal(whole).astype(shape.mx_dtype)
    mx.eval(x)
    return x


def dependent_us(call: Attention, shape: Shape) -> float:
    """Microseconds per call when each output is the next call's query."""

    def chain() -> list[mx.array]:
        q = _query(shape)
        for _ in range(CALLS):
            q = call(q)
        return [q]

    return _median_us(chain)


def together_us(call: Attention, shape: Shape) -> float:
    """Microseconds per call when `CALLS` independent ones are evaluated together."""
    return _median_us(lambda: [call(q) for q in [_query(shape) for _ in range(CALLS)]])


def _query(shape: Shape) -> mx.array:
    heads = shape.kv_heads * shape.group
    q = mx.random.normal((shape.batch, heads, shape.steps, shape.dim))
    q = q.astype(shape.mx_dtype)
    mx.eval(q)
    return q


def _median_us(build: Callable[[], list[mx.array]]) -> float:
    """Microseconds per call to evaluate the graph of `CALLS` that ``build`` makes."""
    times = []
    for _ in range(REPEATS + 2):
        outputs = build()
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(outputs)
        mx.synchronize()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times[2:])


def host_us(call: Attention, shape: Shape, count: int = 200) -> float:
    """Microseconds the host needs to build the graph of one call."""
    q = _query(shape)
    mx.eval(call(q))
    start = time.perf_counter()
    outputs = [call(q) for _ in range(count)]
    elapsed = time.perf_counter() - start
    mx.eval(outputs)
    return elapsed / count * 1e6


def affine(length: int, shape: Shape) -> Attention:
    """mlx-lm's 4-bit attention: two quantized products and a softmax."""
    from mlx_lm.models.base import quantized_scaled_dot_product_attention as attention

    whole = (1, shape.kv_heads, length, shape.dim)
    kv = [
        mx.quantize(mx.random.normal(whole).astype(mx.float16), group_size=64, bits=4)
        for _ in range(2)
    ]
    mx.eval(kv)
    return lambda q: attention(q * 1.0, *kv, 0.09, None, 64, 4)


def fp16(length: int, shape: Shape) -> Attention:
    """MLX's own attention on an uncompressed cache."""
    kv = [_plain(length, shape) for _ in range(2)]
    mask = _mask(shape)
    return lambda q: mx.fast.scaled_dot_product_attention(q, *kv, scale=0.09, mask=mask)


def _mask(shape: Shape) -> str | None:
    return "causal" if shape.steps > 1 else None


def packed(
    backend: Gpu, spec: str, length: int | Sequence[int], shape: Shape
) -> Attention:
    """Our kernels on made-up codes."""
    keys, values = made_up(spec, length, shape)
    mask = _mask(shape)
    keys, values = (replace(side, backend=backend) for side in (keys, values))
    return lambda q: tq.attend(q, keys, values, 0.09, mask)


def check(backend: Gpu, spec: str, shape: Shape = LLAMA) -> float:
    """Relative error of the kernels against the reference at 3,000 tokens."""
    sides = made_up(spec, 3000, shape._replace(batch=1))
    q, mask = _query(shape._replace(batch=1)), _mask(shape)
    got, want = (
        tq.attend(x, *[replace(side, backend=by) for side in sides], 0.09, mask)
        for x, by in ((q, backend), (q.astype(mx.float32), Reference()))
    )
    got = got.astype(mx.float32)
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()


def attentions(
    backend: Gpu, lengths: list[int], specs: list[str], shape: Shape
) -> Iterator[tuple[int, str, Attention]]:
    """(length, name, call) of everything that is timed."""
    for length in lengths:
        yield length, "fp16", fp16(length, shape)
        if length <= _AFFINE_UP_TO and shape == LLAMA:
            yield length, "mlx-lm 4", affine(length, shape)
        for spec in specs:
            yield length, spec, packed(backend, spec, length, shape)


# Kernels one by one: a child under ncu makes the calls between marks; the parent reads.

_MARK = "bench_mark"
#: Names of kernels that ncu times: marks, ours, MLX's attention. It takes a tenth of a
#: second for each, and making the caches up launches thousands. mlx-lm's products
#: have other names, so its 4 bits have dependent calls only.
_TIMED = "regex:bench_mark|tq_|sdpa|attention"
_PROFILED_CALLS = 4


def profiled(backend: Gpu, lengths: list[int], specs: list[str], shape: Shape) -> None:
    """Make every call some times, each between two launches of a kernel of ours."""
    mark = mx.fast.cuda_kernel(
        name=_MARK, input_names=["x"], output_names=["y"], source="y[0] = x[0];"
    )

    def put_mark() -> None:
        mx.eval(
            mark(
                inputs=[mx.zeros((8,))],
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
                output_shapes=[(8,)],
                output_dtypes=[mx.float32],
            )
        )

    for _, _, call in attentions(backend, lengths, specs, shape):
        for _ in range(_PROFILED_CALLS):
            q = _query(shape)
            put_mark()
            mx.eval(call(q))
            put_mark()


def kernels_us(
    backend: Gpu, lengths: list[int], specs: list[str], shape: Shape
) -> list[list[float]] | None:
    """Microseconds of each kernel of the fastest call, in the order of `attentions`.

    None where there is no ncu, or it cannot read this GPU.
    """
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None or mx.metal.is_available():
        return None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        options = ["--clock-control", "none", "--cache-control", "none", "--csv"]
        options += ["--kernel-name", _TIMED]
        options += ["--metrics", "gpu__time_duration.sum", "--log-file", str(log)]
        child = [sys.executable, __file__, "--profiled", *map(str, lengths)]
        run = [ncu, *options, *child, "--specs", *specs]
        for name, number in shape._asdict().items():
            run += [f"--{name.replace('_', '-')}", str(number)]
        if backend.tuning.fma_rows is not None:
            run.append(f"--{'' if backend.tuning.fma_rows else 'no-'}multiply-adds")
        done = subprocess.run(run, capture_output=True, text=True)
        rows = list(csv.reader(log.open())) if log.exists() else []
    times: list[tuple[str, float]] = []
    for row in rows:
        if len(row) > 12 and row[-3] == "gpu__time_duration.sum":
            scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0}[row[-2]]
            times.append((row[4], float(row[-1].replace(",", "")) * scale))
    if not times:
        print(f"ncu gave no times: {done.stdout[-300:]} {done.stderr[-300:]}")
        return None
    calls: list[list[float]] = []
    inside = False
    for name, us in times:
        if _MARK in name:
            inside = not inside
            if inside:
                calls.append([])
        elif inside:
            calls[-1].append(us)
    # The first call of a kernel is cold.
    groups = [
        calls[i : i + _PROFILED_CALLS] for i in range(0, len(calls), _PROFILED_CALLS)
    ]
    return [min(group[1:], key=sum) for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lengths", nargs="*", type=int, default=list(LENGTHS))
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument(
        "--multiply-adds",
        action=argparse.BooleanOptionalAction,
        help="how to take up to 4 query rows, instead of what the kernels choose",
    )
    parser.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    for name, number in LLAMA._asdict().items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(number), default=number)
    options = parser.parse_args()
    shape = Shape(*(getattr(options, name) for name in Shape._fields))
    lengths = options.lengths or list(LENGTHS)
    launcher = MlxLauncher("metal" if mx.metal.is_available() else "cuda")
    forced = options.multiply_adds
    tuning = UNTUNED if forced is None else Tuning(fma_rows=4 if forced else 0)
    backend = Gpu(launcher, None, tuning)
    if options.profiled:
        profiled(backend, lengths, options.specs, shape)
        return
    print(f"{backend.name}, {backend.simdgroups} simdgroups to a launch")
    for spec in options.specs:
        print(f"{spec}: error against the reference {check(backend, spec, shape):.1e}")
    hosts = {
        "fp16": fp16(64, shape),
        "k3v3": packed(backend, "k3v3", 64, shape),
    }
    print(
        "host, us to build one call's graph: "
        + ", ".join(
            f"{name} {host_us(call, shape):.0f}" for name, call in hosts.items()
        )
    )
    kernels = kernels_us(backend, lengths, options.specs, shape)
    results: dict[int, dict[str, dict]] = {}
    fp16_us: dict[int, dict[str, float]] = {}
    for index, (length, name, call) in enumerate(
        attentions(backend, lengths, options.specs, shape)
    ):
        row: dict = {"dependent": round(dependent_us(call, shape), 1)}
        if kernels is not None and kernels[index]:
            row["kernels"] = [round(us, 1) for us in kernels[index]]
        if options.throughput:
            row["together"] = round(together_us(call, shape), 1)
        # Only times by one clock are compared.
        clock = "kernels" if "kernels" in row else "dependent"
        alone = sum(row["kernels"]) if clock == "kernels" else row["dependent"]
        if name == "fp16":
            fp16_us[length] = {clock: alone, "dependent": row["dependent"]}
        base = fp16_us[length].get(clock)
        ratio = f"x fp16 {base / alone:5.2f}" if base else ""
        if length not in results:
            print(f"\n{length} tokens")
        results.setdefault(length, {})[name] = row
        parts = " + ".join(f"{us:g}" for us in row.get("kernels", []))
        print(
            f"{name:28} {alone:8.1f} us  {ratio:12}  "
            f"dependent {row['dependent']:8.1f}  {parts}",
            flush=True,
        )
    device = mx.device_info().get("device_name", str(mx.default_device()))
    report = {"device": device, "mlx": mx.__version__, "us": results}
    report["shape"] = shape._asdict()
    print(json.dumps(report))


if __name__ == "__main__":
    main()

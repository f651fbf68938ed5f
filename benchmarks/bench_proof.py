"""What a proof costs: from first use to the verdict, when there is one, and per step.

    python benchmarks/bench_proof.py [--on simulator|cuda|metal|none] [--starts 15]

First use: a whole check in its child process, as caches begin it; the simulator is that
of ``tests/metalsim``, on this CPU. With a verdict: in fresh processes, from MLX and the
package imported and MLX's first evaluation done, to 32 layers' backends chosen; beside
it the same on a machine whose kernels need no proof. Per step: the host's work of one
layer's attention, which a launcher takes that does nothing, with and without a shadow
that has seen its step. Medians; of steps the least of 15.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from bench_host import NoLauncher

import mlx_turboquant as tq
from mlx_turboquant import diagnosis
from mlx_turboquant.backends import proved
from mlx_turboquant.backends.geometry import machine_simdgroups
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.shadow import Shadow
from mlx_turboquant.cache.quantizers import quantizers_of
from mlx_turboquant.proof import runner
from mlx_turboquant.proof.runner import Job
from mlx_turboquant.proof.store import Store, Verdict
from mlx_turboquant.segments import PreparedSteps
from mlx_turboquant.tiles import in_tiles

LAYERS, DIM = 32, 128
SPECS = ("k3v3", "k4v3", "k3v3,codec=trellis")
#: One start: prints milliseconds of choosing 32 layers' backends, of the first, and
#: whether kernels were taken.
START = f"""
import json, sys, time
import mlx.core as mx
import mlx_turboquant as tq
from mlx_turboquant.backends import proved, select
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.cache.quantizers import quantizers_of
class Launcher:
    name = sys.argv[1]
gpu = Gpu(Launcher(), 512)
select.gpu_backend = lambda: gpu
sides = quantizers_of(tq.CacheSpec.parse("k3v3"), ({DIM}, {DIM}), mx.float16)
for side in sides:
    mx.eval(side.codec.encode_format.table)  # a cache needs it, proof or no proof
times = [time.perf_counter()]
for layer in range({LAYERS}):
    choice = select.resolve(*sides, mx.float16)
    times.append(time.perf_counter())
ms = [1e3 * (t - times[0]) for t in times]
print(json.dumps([ms[-1], ms[1], choice.backend.name]))
"""


def first_use(on: str) -> None:
    """Seconds of whole checks, and what they came to."""
    launcher = type("Launcher", (), {"name": "metal" if on == "simulator" else on})()
    simdgroups = machine_simdgroups(launcher.name)
    backend = "proof_fakes:simulated" if on == "simulator" else ""
    for spec in SPECS:
        for dtype in (mx.float16, mx.bfloat16):
            sides = quantizers_of(tq.CacheSpec.parse(spec), (DIM, DIM), dtype)
            key = proved.key_of(Gpu(launcher, simdgroups), *sides, dtype)
            job = Job(key.subject, launcher.name, simdgroups, backend)
            verdict = runner.run(job, None, 300)
            print(f"first use on {on}, {verdict.subject}: {verdict.status}", end=", ")
            print(f"{verdict.history} {verdict.reason}".rstrip())


def with_a_verdict(starts: int) -> None:
    """Milliseconds that a start pays where the kernels are proved."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "XDG_CACHE_HOME": home}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        environment.pop("MLX_TQ_BACKEND", None)
        launcher = type("Launcher", (), {"name": "metal"})()
        sides = quantizers_of(tq.CacheSpec.parse("k3v3"), (DIM, DIM), mx.float16)
        key = proved.key_of(Gpu(launcher, 512), *sides, mx.float16)
        folder = Path(home) / "mlx_turboquant" / "proofs"
        Store(folder).write(key.digest, Verdict("ok", str(key.subject)))
        for name in ("metal", "cuda"):
            rows = []
            for _ in range(starts):
                done = subprocess.run(
                    [sys.executable, "-c", START, name],
                    env=environment,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                rows.append(json.loads(done.stdout))
            assert {row[2] for row in rows} == {name}
            whole, first = (statistics.median(row[i] for row in rows) for i in (0, 1))
            proof = "a proof to look up" if name == "metal" else "no proof needed"
            print(
                f"{proof}: {whole:.2f} ms for {LAYERS} layers, {first:.2f} of it for "
                "the first"
            )


def per_step(repeats: int = 2000) -> None:
    """Microseconds of `Gpu.attend`, plain and behind a shadow that is done."""
    cache = tq.TurboQuantCache("k3v3")
    for tokens in (500, 1):
        kv = mx.random.normal((1, 8, tokens, DIM)).astype(mx.float16)
        cache.update_and_fetch(kv, kv)
    plain = Gpu(NoLauncher(), 512)
    shadow = Shadow(plain, print).backend
    shadow.watch = None  # as it is behind the first step
    q = mx.random.normal((1, 32, 1, DIM)).astype(mx.float16)
    mx.eval(q)
    handles = {}
    for name, backend in (("plain", plain), ("proved", shadow)):
        prepared = PreparedSteps()
        handles[name] = [
            replace(
                side,
                packed=in_tiles(side.packed, side.quantizer.layout),
                backend=backend,
                prepared=prepared,
            )
            for side in cache.compressed()
        ]
    times: dict[str, list[float]] = {name: [] for name in handles}
    for _ in range(15):
        for name, sides in handles.items():
            start = time.perf_counter()
            for _ in range(repeats):
                tq.attend(q, *sides, 0.09)
            times[name].append(1e6 * (time.perf_counter() - start) / repeats)
    for name, each in times.items():
        print(f"a layer's attention, {name}: {min(each):.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--on", default="none", choices=["simulator", "cuda", "metal", "none"]
    )
    parser.add_argument("--starts", type=int, default=15)
    options = parser.parse_args()
    for name, value in diagnosis.machine().items():
        print(f"{name}: {value}")
    print(f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    if options.on == "simulator":
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    if options.on != "none":
        first_use(options.on)
    with_a_verdict(options.starts)
    per_step()


if __name__ == "__main__":
    main()

"""What runs the kernels: by default the simulator, where clang >= 17 is, else loud
skips; with ``--kernels cuda`` or ``metal``, this machine's GPU."""

import os
import platform
import sys

import metalsim
import mlx.core as mx
import pytest

from mlx_turboquant.kernels.kernel import MlxLauncher
from mlx_turboquant.pages import PagePool


@pytest.fixture(autouse=True)
def freed_pages_are_poisoned(monkeypatch):
    """A kernel that reads a page which nobody holds gives NaN."""
    monkeypatch.setattr(PagePool, "poisons", True)


class Simulator:
    """A `Launcher` that runs the real Metal sources on this CPU."""

    name = "simulator"

    def __init__(self):
        self._built = {}

    def __call__(self, launch, inputs):
        kernel, template, grid, threadgroup, output_shapes, output_dtypes = launch
        assert all(g % t == 0 for g, t in zip(grid, threadgroup, strict=True))
        assert all(array.size >= 8 for array in inputs), "would be constant memory"
        if kernel not in self._built:
            self._built[kernel] = metalsim.metal_kernel(
                name=kernel.name,
                input_names=list(kernel.inputs),
                output_names=list(kernel.outputs),
                source=kernel.body("metal"),
                header=kernel.header("metal"),
                ensure_row_contiguous=False,
            )
        mx.eval(inputs)
        return self._built[kernel](
            inputs=inputs,
            template=template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
        )


@pytest.fixture(scope="session")
def lane(pytestconfig):
    """``simulator``, ``metal`` or ``cuda``."""
    return pytestconfig.getoption("--kernels")


@pytest.fixture(autouse=True, scope="session")
def _clang(lane):
    if lane != "simulator":
        return
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the Metal simulator runs on x86-64 Linux only")
    try:
        metalsim.find_clang()
    except metalsim.MetalSimError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must run the Metal simulator: {error}")
        pytest.skip(f"KERNELS NOT TESTED: {error}")


@pytest.fixture(scope="session")
def launcher(lane):
    """What runs the kernels under test."""
    return Simulator() if lane == "simulator" else MlxLauncher(lane)


@pytest.fixture(params=["plain", "debug", "random"])
def mode(request, lane, monkeypatch):
    """The simulator's modes: as is, with shadow memory, in a random schedule."""
    if lane != "simulator":
        if request.param != "plain":
            pytest.skip("a mode of the simulator")
        return request.param
    monkeypatch.setattr(metalsim.config, "debug", request.param == "debug")
    sched = "random" if request.param == "random" else "forward"
    monkeypatch.setattr(metalsim.config, "sched", sched)
    return request.param

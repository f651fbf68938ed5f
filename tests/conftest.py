"""Fixtures. OpenBLAS must be loaded before MLX, so this is the first thing here."""

from mlx_turboquant.blas import prefer_openblas

FAST_BLAS = prefer_openblas()

import subprocess  # noqa: E402
import sys  # noqa: E402

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402
from helpers import MODEL  # noqa: E402
from hypothesis import settings  # noqa: E402

import mlx_turboquant as tq  # noqa: E402
from mlx_turboquant.proof.store import Store  # noqa: E402

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption(
        "--kernels",
        default="simulator",
        choices=["simulator", "metal", "cuda"],
        help="what runs tests/kernels: the Metal simulator, or this machine's GPU",
    )


def pytest_report_header(config):
    return f"mlx on {mx.default_device()}, OpenBLAS {'yes' if FAST_BLAS else 'no'}"


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _unhooked():
    """No module's tests find hooks of another's."""
    yield
    tq.uninstall()


@pytest.fixture(scope="session")
def books():
    """The bundled (model, tokenizer)."""
    return tq.load(str(MODEL))


@pytest.fixture
def hooked():
    """Undo every hook after the test."""
    yield
    tq.uninstall()


@pytest.fixture(scope="session")
def run_cli():
    """Run a command of ours in a process of its own: (exit code, stdout, stderr)."""

    def run(*args, stdin="", **options):
        done = subprocess.run(
            [sys.executable, "-m", "mlx_turboquant", *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            **options,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def verdicts(tmp_path):
    """A folder of verdicts that is not the user's."""
    return Store(tmp_path / "proofs")


@pytest.fixture
def counted(monkeypatch):
    """The processes that are started."""
    started = []
    real = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return started

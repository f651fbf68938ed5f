"""Fixtures. OpenBLAS must be loaded before MLX, so this is the first thing here."""

from mlx_turboquant.blas import prefer_openblas

FAST_BLAS = prefer_openblas()

import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

import mlx.core as mx  # noqa: E402
import pytest  # noqa: E402
from helpers import MODEL  # noqa: E402
from hypothesis import settings  # noqa: E402

import mlx_turboquant as tq  # noqa: E402
from mlx_turboquant.backends import proved, select  # noqa: E402
from mlx_turboquant.cache.quantizers import quantizers_of  # noqa: E402
from mlx_turboquant.proof.ledger import Ledger  # noqa: E402
from mlx_turboquant.proof.store import Store, Verdict  # noqa: E402

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("ci")

# A run in the background of a shell ignores Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """The checking processes that are started."""
    started = []
    real = subprocess.Popen

    def popen(command, *args, **kwargs):
        if "mlx_turboquant.proof.child" in command:
            started.append(command)
        return real(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return started


@pytest.fixture
def a_mac(verdicts, monkeypatch):
    """Caches find Metal here, with kernels whose check is told what to find."""

    from proof_caches import Metal

    proved.shadow_of.cache_clear()
    gpu, ledger = Metal(), Ledger(verdicts)
    monkeypatch.setattr(select, "gpu_backend", lambda: gpu)
    monkeypatch.setattr(proved, "this_ledger", lambda: ledger)
    monkeypatch.delenv(select.VARIABLE, raising=False)
    select.requested.cache_clear()

    def finds(fake):
        monkeypatch.setattr(proved, "STAND_IN", f"proof_fakes:{fake}")
        return gpu, ledger

    yield finds
    ledger.close()
    select.requested.cache_clear()


@pytest.fixture
def a_proved_mac(a_mac):
    """The same, where ``k3v2`` of 64 elements was proved before."""
    gpu, ledger = a_mac("no_such_fake")
    sides = quantizers_of(tq.CacheSpec.parse("k3v2"), (64, 64), mx.float16)
    key = proved.key_of(gpu, *sides, mx.float16)
    ledger.store.write(key.digest, Verdict("ok", "k3v2", checks=33, seconds=3.2))
    return gpu, ledger

"""Fixtures. OpenBLAS must be loaded before MLX, so this is the first thing here."""

from mlx_turboquant.blas import prefer_openblas

FAST_BLAS = prefer_openblas()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import mlx_turboquant as tq  # noqa: E402

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("ci")

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "books-20m"


def pytest_report_header(config):
    return f"mlx on {mx.default_device()}, OpenBLAS {'yes' if FAST_BLAS else 'no'}"


@pytest.fixture(autouse=True)
def _seed():
    mx.random.seed(0)


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
    import subprocess

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


def softmax_attention(q, k, v, scale, mask=None, sinks=None):
    """Float64 attention in numpy: what every backend is held to.

    q (B, Hq, L, Dk), k and v (B, H, T, .); mask as for `tq.attend`.
    """
    q, k, v = (np.array(a, dtype=np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = q @ k.swapaxes(-1, -2) * scale
    length, total = logits.shape[-2:]
    if isinstance(mask, str):
        mask = np.arange(total)[None] <= np.arange(total - length, total)[:, None]
    if mask is not None:
        mask = np.array(mask)
        logits = (
            np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
        )
    if sinks is not None:
        column = np.array(sinks, dtype=np.float64)[None, :, None, None]
        column = np.broadcast_to(column, (*logits.shape[:3], 1))
        logits = np.concatenate([logits, column], axis=-1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., :total] @ v


def relative_error(got, want):
    """Root of the relative squared error, over all elements."""
    got, want = np.array(got, dtype=np.float64), np.array(want, dtype=np.float64)
    return float(np.sqrt(((got - want) ** 2).sum() / (want**2).sum()))

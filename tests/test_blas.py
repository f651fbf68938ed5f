"""How OpenBLAS is loaded."""

import ctypes
import os
import sys

import pytest

from mlx_turboquant.blas import prefer_openblas

NAME = "OPENBLAS_THREAD_TIMEOUT"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("chosen", [None, "20"])
def test_idle_threads_spin_shortly_unless_chosen(chosen, there, monkeypatch):
    """OpenBLAS is told when it is loaded; the environment is left as it was."""
    seen = []

    def load(name, mode):
        seen.append(os.environ[NAME])
        if not there:
            raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv(NAME, raising=False)
    if chosen:
        monkeypatch.setenv(NAME, chosen)
    assert prefer_openblas.__wrapped__() is there
    assert seen == [chosen or "17"]
    assert os.environ.get(NAME) == chosen

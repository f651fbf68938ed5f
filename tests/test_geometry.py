"""How a launch shares tokens among the simdgroups of a machine."""

import subprocess

import mlx.core as mx
import pytest

from mlx_turboquant.backends import geometry
from mlx_turboquant.backends.geometry import MIN_TOKENS_PER_SPLIT, tokens_per_split


@pytest.mark.parametrize("packed", [1, 128, 100, 512, 3000, 8064, 131072])
@pytest.mark.parametrize("sharers", [1, 8, 64, 4096])
@pytest.mark.parametrize("threadgroups", [1, 30, 128, 528])
def test_splits_fill_the_machine_and_are_not_too_short(packed, sharers, threadgroups):
    tokens = tokens_per_split(packed, 128, sharers, threadgroups)
    splits = -(-packed // tokens)
    assert tokens % 128 == 0
    assert splits * sharers <= max(threadgroups, sharers)
    if splits > 1:
        assert tokens >= MIN_TOKENS_PER_SPLIT
    # As many as fit; rounding to whole shares takes at most a third off.
    most = max(1, min(threadgroups // sharers, -(-packed // MIN_TOKENS_PER_SPLIT)))
    assert most / 1.5 <= splits <= most


@pytest.fixture
def apple(monkeypatch):
    """A Mac whose registry says what the test says."""
    said = {}

    def run(*args, **options):
        if said["registry"] is None:
            raise FileNotFoundError("ioreg")
        return subprocess.CompletedProcess(args, 0, said["registry"], "")

    monkeypatch.setattr(geometry.subprocess, "run", run)
    monkeypatch.setattr(
        mx, "device_info", lambda: {"architecture": said["architecture"]}
    )
    geometry.machine_simdgroups.cache_clear()
    yield said
    geometry.machine_simdgroups.cache_clear()


@pytest.mark.parametrize(
    ("registry", "architecture", "simdgroups"),
    [
        ('  "gpu-core-count" = 40\n', "applegpu_g16s", 480),
        ("nothing of the kind", "applegpu_g14d", 720),
        (None, "applegpu_g13g", 96),
        (None, "something new", 512),
    ],
)
def test_apple_cores(apple, registry, architecture, simdgroups):
    apple.update(registry=registry, architecture=architecture)
    assert geometry.machine_simdgroups("metal") == simdgroups


def test_launchers_that_are_no_machine_have_a_number_too():
    assert geometry.machine_simdgroups("simulator") == 512

"""How a launch shares tokens among the simdgroups of a machine."""

import subprocess

import mlx.core as mx
import pytest

from mlx_turboquant.backends import geometry
from mlx_turboquant.backends.geometry import tokens_per_split


@pytest.mark.parametrize("packed", [1, 128, 100, 512, 3000, 8064, 32768, 131072])
@pytest.mark.parametrize("sharers", [1, 8, 64, 4096])
@pytest.mark.parametrize("threadgroups", [1, 30, 128, 528])
def test_splits_fill_the_machine_and_are_not_too_short(packed, sharers, threadgroups):
    tokens = tokens_per_split(packed, 128, sharers, threadgroups)
    splits = -(-packed // tokens)
    assert tokens % 128 == 0
    assert splits * sharers <= max(threadgroups, sharers)
    if splits > 1:
        assert tokens >= 256
    if splits > max(1, threadgroups // sharers // 2):
        assert tokens >= 1024
    # As many as may be; rounding to whole shares takes at most a third off.
    fitting = threadgroups // sharers
    most = max(1, min(fitting // 2, -(-packed // 256)), min(fitting, packed // 1024))
    assert most / 1.5 <= splits <= most


def test_a_split_has_no_more_tokens_than_a_threadgroup_can_take():
    assert tokens_per_split(1 << 20, 128, 8, 528, most=8064) == 8064
    assert tokens_per_split(1 << 20, 128, 8, 528, most=8100) == 8064
    assert tokens_per_split(4096, 128, 8, 528, most=64) == 128
    assert tokens_per_split(8192, 128, 8, 528, most=8064) == 256


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

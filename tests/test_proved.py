"""Caches use kernels where they were proved, say so, and change over when they are."""

import re

import mlx.core as mx
import pytest
from helpers import relative_error
from proof_caches import backend_of, cache_of, grow

import mlx_turboquant as tq
from mlx_turboquant.backends import proved, select
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.proof import key


def test_caches_use_kernels_once_they_are_proved(a_mac):
    gpu, ledger = a_mac("right")
    first = cache_of()
    assert backend_of(first).startswith("reference: its kernels are being checked")
    assert not gpu.used
    (verdict,) = ledger.wait()
    shown = backend_of(cache_of())
    assert re.fullmatch(
        r"metal: proved 20..-..-.. ..:.., 33 checks in \d+\.\d s, largest error \S+",
        shown,
    )
    assert verdict.history in shown
    assert gpu.used
    assert backend_of(cache_of("k16v4")) == "reference: codec identity:16 has no kernel"


def test_a_cache_that_did_not_wait_changes_over_at_its_next_page(a_mac):
    gpu, ledger = a_mac("right")
    cache, other = tq.TurboQuantCache("k3v2"), tq.TurboQuantCache("k3v2")
    for c in (cache, other):
        mx.random.seed(3)
        grow(c, 400, 1)
    assert backend_of(cache).startswith("reference")
    layouts = {side.layout for side in cache._tokens.packed}
    assert layouts == {None}
    cache.trim(150)
    assert cache.packed_length == 247  # a page is cut, and with it a tile
    ledger.wait()
    grow(cache, 60)
    assert cache.packed_length == 256
    assert backend_of(cache).startswith("reference")  # until the next page is due
    assert not gpu.used
    grow(cache, 128, 1)
    assert backend_of(cache).startswith("metal: proved")
    assert None not in {side.layout for side in cache._tokens.packed}
    assert gpu.used[-2:] == ["step", "step"]  # one of them for its shadow
    # What was packed before is what it was.
    mx.random.seed(9)
    (out,) = grow(cache, 1)
    want = Reference().attend
    vars(cache._backend)["attend"] = want
    cache.trim(1)
    mx.random.seed(9)
    assert relative_error(out, grow(cache, 1)[0]) < 1e-6


def test_caches_say_why_kernels_are_not_used(a_mac):
    gpu, ledger = a_mac("one_percent_off")
    cache_of()
    ledger.wait()
    with pytest.warns(UserWarning, match="tq: its kernels gave wrong results here"):
        cache = cache_of()
    shown = backend_of(cache)
    assert "gave wrong results here (matrix products" in shown
    assert "log: " in shown
    assert not gpu.used


def test_the_variable_goes_without_proof(a_mac, monkeypatch, counted):
    gpu, _ = a_mac("one_percent_off")
    for value, name in (("gpu", "metal"), ("reference", "reference: MLX_TQ_BACKEND")):
        monkeypatch.setenv(select.VARIABLE, value)
        select.requested.cache_clear()
        assert backend_of(cache_of()).startswith(name)
    assert gpu.used
    assert not counted


def test_cuda_needs_no_proof(a_mac, counted):
    gpu, _ = a_mac("one_percent_off")
    gpu.launcher.name = "cuda"
    assert backend_of(cache_of()) == "cuda"
    assert not counted


def test_codecs_of_others_are_not_checked(a_mac, monkeypatch, counted):
    from mlx_turboquant.codecs.turboquant import TurboQuant

    a_mac("right")
    monkeypatch.setattr(TurboQuant, "__module__", "someone.elses")
    assert "would not know codec turboquant:3" in backend_of(cache_of())
    assert not counted


def test_layers_ask_the_folder_once(a_proved_mac, monkeypatch):
    """Once a process: neither a layer nor a step pays for a proof that there is."""
    _, ledger = a_proved_mac
    read, hashed = [], []
    store_read, texts = ledger.store.read, key.text_hash
    monkeypatch.setattr(
        ledger.store, "read", lambda digest: read.append(digest) or store_read(digest)
    )
    monkeypatch.setattr(proved, "text_hash", lambda: hashed.append(1) or texts())
    proved._keys.clear()
    caches = [tq.TurboQuantCache("k3v2") for _ in range(8)]
    for cache in caches:
        grow(cache, 300, 1, 1, 128, 1)
        assert backend_of(cache).startswith("metal: proved")
    assert len(read) == len(hashed) == 1

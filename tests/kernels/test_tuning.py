"""Tunings move speed only: every one that is tried gives what the reference gives."""

import itertools
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers import relative_error
from test_decode_attention import TOLERANCE, filled

from mlx_turboquant.backends import specialize
from mlx_turboquant.backends.call import AttendCall
from mlx_turboquant.backends.gpu import Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.kernels.tuning import UNTUNED, Heads, Tuning
from mlx_turboquant.proof import workload
from mlx_turboquant.proof.judge import WrongError
from mlx_turboquant.proof.key import Subject
from mlx_turboquant.proof.variants import axes
from mlx_turboquant.proof.workload import Workload
from mlx_turboquant.quantizer import Sides

#: spec, dims, rows
CASES = {
    "128": ("k3v3", (128, 128), 4),
    "64": ("k4v3", (64, 64), 1),
    "80": ("k3v2", (72, 80), 3),
    "256": ("k3v3", (64, 256), 8),
    "512": ("k2v3", (64, 512), 2),
    "trellis": ("k3v3,codec=trellis", (64, 128), 2),
}


def tunings_of(values, rows):
    """One number at a time, on what untuned launches are where there is no GPU."""
    for name, numbers in axes(values, rows, "metal"):
        for number in numbers:
            yield Tuning(**{name: number})


@pytest.mark.parametrize("case", CASES)
def test_every_tuning_agrees_with_the_reference(case, launcher, mode):
    spec, dims, rows = CASES[case]
    keys, values = filled(spec, 700, 2, *dims)
    q = mx.random.normal((1, 2 * rows, 1, dims[0]))
    call = AttendCall(q, keys, values, dims[0] ** -0.5)
    want, backend = Reference().attend(call), Gpu(launcher, 40)
    tried = list(tunings_of(values.quantizer, rows))
    tried.append(Tuning(1, 0, 2.0, 128, 256, 4) if case == "128" else UNTUNED)
    if mode != "plain":  # sizes only move what a threadgroup gets
        tried = [t for t in tried if {"simdgroups", "merge_simdgroups"} & {*t.changes}]
    for tuning in tried:
        keys.prepared.clear()
        got = backend.tuned(tuning).attend(call)
        assert relative_error(got, want) < TOLERANCE, tuning


class Sizes:
    """A launcher that notes what it was asked to launch."""

    name = "metal"

    def __init__(self):
        self.launches = []

    def __call__(self, launch, inputs):
        self.launches.append(launch)
        shapes = zip(launch.output_shapes, launch.output_dtypes, strict=True)
        return [mx.zeros(*shape) for shape in shapes]


def launched(tuning, rows=4, batch=1, tunings=None):
    """(Kernel, FMA_ROWS, simdgroups of either pass, splits) of one attention."""
    keys, values = filled("k3v3,page=32,window=32", 4200, 2, 128, 128, batch=batch)
    launcher = Sizes()
    call = AttendCall(mx.zeros((batch, 2 * rows, 1, 128)), keys, values, 0.1)
    backend = Gpu(launcher, 96)
    backend.tuned(tuning, tunings or {}).attend(call)
    split, merge = launcher.launches
    templates = [dict(launch.template) for launch in launcher.launches]
    splits = split.grid[0] // split.threadgroup[0]
    return (
        templates[0]["FMA_ROWS"],
        templates[0]["SIMDGROUPS"],
        templates[1]["SIMDGROUPS"],
        splits - -(-(4 + keys.recent.shape[2]) // split.threadgroup[0]),
        merge.threadgroup[0] // 32,
    )


def test_a_tuning_is_what_is_launched():
    """4,128 packed tokens, 2 KV heads; 96 simdgroups are 24 threadgroups of 4."""
    assert launched(UNTUNED) == (4, 4, 8, 6, 8)
    assert launched(Tuning(simdgroups=2))[1:4:2] == (2, 11)
    assert launched(Tuning(fma_rows=3))[0] == 0
    assert launched(Tuning(fma_rows=3), rows=3)[0] == 3
    assert launched(Tuning(fill=2.0))[3] == 11
    assert launched(Tuning(few_tokens=1024))[3] == 5
    assert launched(Tuning(many_tokens=512))[3] == 7
    assert launched(Tuning(merge_simdgroups=4))[2::2] == (4, 4)


def test_a_tuning_is_for_the_heads_it_was_measured_with():
    """Twice as many sequences are as many threadgroups as twice as many heads."""
    tuned = {Heads(2, 4): Tuning(simdgroups=1), Heads(4, 4): Tuning(simdgroups=2)}
    assert launched(UNTUNED, tunings=tuned)[1] == 1
    assert launched(UNTUNED, batch=2, tunings=tuned)[1] == 2
    assert launched(UNTUNED, rows=3, tunings=tuned)[1] == 4


@pytest.mark.parametrize(
    ("v_dim", "rows", "dialect", "teams", "by_fma"),
    [
        (128, 4, "cuda", [1, 2], [4]),
        (128, 8, "cuda", [1, 2], []),
        (64, 1, "metal", [1], [0]),
        (80, 3, "metal", [1, 2], [2]),
        (256, 4, "metal", [2], [3]),
        (512, 1, "metal", [8], [0]),
        (512, 2, "cuda", [8], []),
    ],
)
def test_what_is_tried(v_dim, rows, dialect, teams, by_fma):
    subject = Subject("turboquant:3", "turboquant:3", 64, v_dim, 0, "float16", "")
    gains = Sides(*(mx.ones((1, 1, 1, dim)) for dim in (64, v_dim)))
    values = subject.quantizers(gains).values
    found = dict(axes(values, rows, dialect))
    assert found["simdgroups"] == teams
    assert found["fma_rows"] == by_fma
    assert specialize.split_simdgroups(values) not in teams
    for name, numbers in found.items():
        for number in numbers:
            assert Tuning(**{name: number}).changes == {name: number}


@pytest.fixture
def short(monkeypatch):
    """Workloads that the simulator has time for."""
    monkeypatch.setattr(workload, "LENGTHS", (64, 128))
    monkeypatch.setattr(workload, "_BYTES", 40_000)
    monkeypatch.setattr(workload, "CALLS", 5)


SUBJECT = Subject("turboquant:3", "turboquant:2", 64, 128, 32, "bfloat16", "")


def noted(subject, launcher):
    """A workload, and (call, tuning, output) of each attention to come."""
    calls = []

    class Noted(Gpu):
        def attend(self, call):
            out = super().attend(call)
            calls.append((call, self.tuning, out))
            return out

    return Workload(subject, Heads(2, 2), Noted(launcher, 8)), calls


def test_a_workload_feeds_outputs_to_queries(short, launcher):
    work, calls = noted(SUBJECT, launcher)
    one = Tuning(simdgroups=2)
    assert work.seconds(one, 128) > 0
    chain = calls[-5:]
    for (_, _, out), (call, tuning, _) in itertools.pairwise(chain):
        assert tuning == one
        assert call.q.shape == (1, 4, 1, 64)
        assert call.q.dtype == mx.bfloat16
        assert mx.array_equal(call.q, out[..., :64]).item()
        assert call.keys.packed_length == call.values.packed_length == 128
    sides = {id(s): s.packed for call, *_ in chain for s in (call.keys, call.values)}
    assert len(sides) > 2  # more than one cache
    assert sum(packed.nbytes for packed in sides.values()) >= 40_000
    out = chain[-1][2].astype(mx.float32)
    assert 0 < mx.max(mx.abs(out)).item() < 10


def test_a_workload_takes_values_shorter_than_keys(short, launcher):
    subject = replace(SUBJECT, k_dim=128, v_dim=64)
    work, calls = noted(subject, launcher)
    assert work.seconds(UNTUNED, 64) > 0
    assert {call.q.shape for call, *_ in calls} == {(1, 4, 1, 128)}


def test_a_tuning_that_is_wrong_is_refused(short, launcher):
    class Wrong(Gpu):
        def attend(self, call):
            factor = 1.02 if self.tuning.fill else 1
            return super().attend(call) * factor

    work = Workload(SUBJECT, Heads(2, 2), Wrong(launcher, 8))
    work.hold(Tuning(simdgroups=2))
    with pytest.raises(WrongError, match=r"fill 2: 0\.0\d+ from what it was untuned"):
        work.hold(Tuning(fill=2.0))

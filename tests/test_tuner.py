"""The search for the fastest launches, on machines of which every speed is known."""

import random
from dataclasses import asdict

import pytest

from mlx_turboquant.kernels.tuning import UNTUNED, Heads, Tuning
from mlx_turboquant.proof.tuner import BUDGET, LENGTHS, search

HEADS = Heads(8, 4)
AXES = [
    ("simdgroups", (1, 2)),
    ("fma_rows", (4,)),
    ("few_tokens", (128, 512)),
    ("many_tokens", (512, 2048)),
    ("fill", (0.5, 0.75, 1.5, 2.0)),
    ("merge_simdgroups", (4, 16)),
]
NUMBERS = sum(len(numbers) for _, numbers in AXES)


class Machine:
    """Takes as long as it is told, and so long that time passes.

    Args:
        factors: (name, number) of a tuning to what it multiplies the times at 4,096
            and 32,768 tokens with.
        noise: Relative standard deviation of a time.
        refused: A (name, number) that cannot be launched.
    """

    def __init__(self, factors, noise=0.0, seed=0, compiling=0.0, refused=None):
        self.factors, self.noise, self.compiling = factors, noise, compiling
        self.refused, self.random, self.now = refused, random.Random(seed), 0.0
        self.held, self.calls = [], 0

    def hold(self, tuning):
        self.held.append(tuning)
        self.now += self.compiling
        if self.refused in tuning.changes.items():
            raise RuntimeError("too many resources requested for launch")

    def time_call(self, tuning, tokens):
        assert tuning in self.held or tuning == UNTUNED
        seconds = {4096: 40e-6, 32768: 200e-6}[tokens]
        for change in tuning.changes.items():
            seconds *= self.factors.get(change, (1, 1))[LENGTHS.index(tokens)]
        seconds *= 1 + self.noise * self.random.gauss(0, 1)
        self.now += 20 * seconds
        self.calls += 1
        return seconds

    def search(self, **options):
        clock = lambda: self.now  # noqa: E731
        return search(AXES, self.time_call, self.hold, clock, HEADS, **options)


def test_a_clear_gain_is_kept_and_measured_again():
    noted = []
    found = Machine({("simdgroups", 2): (0.9, 0.8)}).search(note=noted.append)
    assert found.tuning == Tuning(simdgroups=2)
    assert noted[1] == (
        "untuned -> simdgroups 2: 40 -> 36 us at 4096, 200 -> 160 us at 32768 "
        "(11 turns): faster"
    )
    assert noted[2].startswith("simdgroups 2 -> fma_rows 4: 36 -> 36 us at 4096")
    assert len(noted) == NUMBERS + 1
    assert found.us == {"4096": (40.0, 36.0), "32768": (200.0, 160.0)}
    assert (found.heads, found.tried, found.reason) == (HEADS, NUMBERS, "")
    assert str(found) == "simdgroups 2 (1.11x at 4096, 1.25x at 32768 tokens)"


@pytest.mark.parametrize(
    ("factors", "kept"),
    [
        ((0.98, 0.98), False),  # too little
        ((0.96, 1.0), True),
        ((1.0, 0.96), True),
        ((0.96, 1.005), True),
        ((0.90, 1.02), False),  # worse at the other length
        ((1.02, 0.90), False),
        ((1.0, 1.0), False),
    ],
)
def test_what_is_kept(factors, kept):
    found = Machine({("fill", 1.5): factors}).search()
    assert found.tuning == (Tuning(fill=1.5) if kept else UNTUNED)
    assert bool(found.us) is kept
    assert found.reason == ""


def test_axes_are_searched_one_after_the_other():
    """Each from the best so far; of one axis the best, and gains multiply."""
    machine = Machine(
        {
            ("simdgroups", 1): (0.9, 0.9),
            ("simdgroups", 2): (0.8, 0.8),
            ("few_tokens", 128): (0.95, 1.0),
            ("fill", 2.0): (1.0, 0.95),
        }
    )
    found = machine.search()
    assert found.tuning == Tuning(simdgroups=2, few_tokens=128, fill=2.0)
    gains = {n: best / base for n, (base, best) in found.us.items()}
    assert gains["4096"] == pytest.approx(0.8 * 0.95, rel=1e-3)
    assert gains["32768"] == pytest.approx(0.8 * 0.95, rel=1e-3)
    assert len(machine.held) == NUMBERS + 3  # not the product of all axes
    # What plainly gains nothing is left after a few turns.
    full, few = 2 * 2 * 11, 2 * 2 * 3
    # The three that are left are timed again, each and all together.
    assert machine.calls == 4 * full + (NUMBERS - 4) * few + 3 * full + 2 * full


def test_what_cannot_be_launched_is_left_out():
    factors = {("simdgroups", 1): (0.5, 0.5), ("fill", 0.5): (0.9, 0.9)}
    found = Machine(factors, refused=("simdgroups", 1)).search()
    assert found.tuning == Tuning(fill=0.5)
    assert found.tried == NUMBERS
    reason = "simdgroups 1 was left out: too many resources requested for launch"
    assert found.reason == reason


def test_time_that_is_over_ends_it():
    factors = {("simdgroups", 2): (0.9, 0.9), ("fill", 2.0): (0.5, 0.5)}
    machine = Machine(factors, compiling=2.0)
    found = machine.search()
    assert found.tuning == Tuning(simdgroups=2)  # fill's turn never came
    assert found.tried == BUDGET / 2
    assert f"{NUMBERS - found.tried} of {NUMBERS} were not tried: 8 s" in found.reason
    assert BUDGET <= found.seconds < BUDGET + 2
    assert machine.now == pytest.approx(found.seconds, abs=0.01)


def test_a_search_takes_a_few_seconds():
    """On a GPU that takes 2 ms at 32,768 tokens, a tenth of a second to compile."""
    factors = dict.fromkeys([(n, x) for n, xs in AXES for x in xs], (10, 10))
    machine = Machine(factors, compiling=0.1)
    assert machine.search().seconds < BUDGET


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.10])
def test_noise_is_no_gain(noise):
    """Of 100 searches among equals; of 4,000 at up to 20% none did."""
    found = [Machine({}, noise, seed).search() for seed in range(100)]
    changed = [one for one in found if one.tuning != UNTUNED]
    assert not changed
    flukes = [one for one in found if "gained nothing when" in one.reason]
    assert len(flukes) <= 50  # what a second measurement is for


def test_noise_hides_no_large_gain():
    factors = {("simdgroups", 2): (0.85, 0.85)}
    found = [Machine(factors, 0.02, seed).search() for seed in range(40)]
    assert sum(one.tuning.simdgroups == 2 for one in found) >= 39


def test_a_gain_that_does_not_last_is_given_up():
    """As of a machine that was busy with something else while others were timed."""
    machine = Machine({("simdgroups", 1): (0.5, 0.5)})
    time_call, begun = machine.time_call, []

    def later_all_are_equal(tuning, tokens):
        if tuning.merge_simdgroups == 16:
            machine.factors = {}
        begun.append(tuning)
        return time_call(tuning, tokens)

    machine.time_call = later_all_are_equal
    found = machine.search()
    assert found.tuning == UNTUNED
    assert found.us == {}
    assert found.reason == "simdgroups 1 gained nothing when it was timed again"


def test_a_fluke_does_not_ride_along_with_a_gain():
    machine = Machine({("fill", 2.0): (0.8, 0.8), ("simdgroups", 1): (0.9, 0.9)})
    time_call = machine.time_call

    def a_while(tuning, tokens):
        if tuning.merge_simdgroups == 16:
            machine.factors.pop(("simdgroups", 1), None)
        return time_call(tuning, tokens)

    machine.time_call = a_while
    found = machine.search()
    assert found.tuning == Tuning(fill=2.0)
    assert found.us["4096"] == (40.0, 32.0)


@pytest.mark.parametrize(
    "numbers",
    [
        {"simdgroups": 0},
        {"simdgroups": 9},
        {"simdgroups": 2.0},
        {"simdgroups": "2"},
        {"simdgroups": True},
        {"fma_rows": 5},
        {"fill": 0},
        {"fill": float("nan")},
        {"few_tokens": 16},
        {"merge_simdgroups": 32},
    ],
)
def test_numbers_of_a_tuning_have_ranges(numbers):
    (name,) = numbers
    with pytest.raises(ValueError, match=rf"^{name}=.* is not in \d"):
        Tuning(**numbers)


def test_a_tuning_says_what_it_changes():
    assert str(Tuning(simdgroups=2, fill=0.5)) == "simdgroups 2, fill 0.5"
    assert str(UNTUNED) == "untuned"
    assert set(asdict(UNTUNED)) == {name for name, _ in AXES}

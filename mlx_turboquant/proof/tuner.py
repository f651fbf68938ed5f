"""Finds the launches of decode attention that are fastest on this machine.

Owns the search: one number after the other (`variants` says which there are), each
against the best so far, by turns. What is timed is `workload`'s. A change must gain
clearly, and is measured once more when all are found, each and all together: what is
chosen of many looks better than it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..kernels.tuning import UNTUNED, Heads, Tuning
from .tuned import Tuned

#: Packed tokens that are timed.
LENGTHS = (4096, 32768)
#: What a change must gain at one length, and may lose at the others.
GAIN, LOSS = 0.03, 0.01
#: Seconds, compilers' included, after which no other change is tried.
BUDGET = 8.0
#: Turns of a comparison, those after which most changes are known to gain nothing, and
#: those of the former that a gain must show in: 9 of 11 is 1 in 30 by chance.
_TURNS, _FEW_TURNS, _WON = 11, 3, 9

#: A number of `Tuning`, and what to try for it.
Axis = tuple[str, Sequence[float]]
#: Seconds of one call with a tuning over so many packed tokens.
TimeCall = Callable[[Tuning, int], float]

#: Raises if a tuning cannot be launched, or gives other results than none.
Hold = Callable[[Tuning], None]


@dataclass(frozen=True)
class Comparison:
    """Two tunings, by turns.

    Attributes:
        seconds: By packed tokens, of each turn: the one's and the other's.
    """

    seconds: dict[int, list[tuple[float, float]]]

    @property
    def gains(self) -> bool:
        """Whether the other is faster at one length, and slower at none."""
        ratios = {n: [b / a for a, b in turns] for n, turns in self.seconds.items()}
        middle = {n: statistics.median(r) for n, r in ratios.items()}
        clear = (
            middle[n] <= 1 - GAIN and sum(x < 1 for x in r) * _TURNS >= _WON * len(r)
            for n, r in ratios.items()
        )
        return any(clear) and max(middle.values()) <= 1 + LOSS

    def __str__(self) -> str:
        times = (f"{a:g} -> {b:g} us at {n}" for n, (a, b) in self.us.items())
        turns = len(next(iter(self.seconds.values())))
        kept = "faster" if self.gains else "no gain"
        return f"{', '.join(times)} ({turns} turns): {kept}"

    @property
    def us(self) -> dict[str, tuple[float, float]]:
        """Medians in microseconds, the one's and the other's."""
        return {
            str(n): (_median_us(a for a, _ in turns), _median_us(b for _, b in turns))
            for n, turns in self.seconds.items()
        }


def search(
    axes: Sequence[Axis],
    time_call: TimeCall,
    hold: Hold,
    clock: Callable[[], float],
    heads: Heads,
    note: Callable[[str], None] = lambda line: None,
    budget: float = BUDGET,
) -> Tuned:
    """The fastest tuning, axis by axis.

    Args:
        axes: What to try, in this order.
        time_call: Times one; called once for each number that is compared.
        hold: Says which tunings to leave out.
        clock: Seconds.
        heads: Of what is timed.
        note: Called with a line about each that was timed, for a log.
        budget: As `BUDGET`.
    """
    start = clock()
    best, tried = UNTUNED, 0
    reasons: list[str] = []
    total = sum(len(values) for _, values in axes)
    for name, value in ((name, value) for name, values in axes for value in values):
        if clock() - start >= budget:
            left = f"{total - tried} of {total}"
            reasons.append(f"{left} were not tried: {budget:g} s were over")
            break
        tried += 1
        change: dict[str, Any] = {name: value}
        trial = replace(best, **change)
        try:
            hold(trial)
            comparison = compare(best, trial, time_call)
        except Exception as problem:  # a compiler's or a driver's, whatever its type
            first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            reasons.append(f"{name} {value:g} was left out: {first}")
            continue
        note(f"{best} -> {name} {value:g}: {comparison}")
        if comparison.gains:
            best = trial
    if len(best.changes) > 1:
        best = _thinned(best, time_call, hold, note)
    us: dict[str, tuple[float, float]] = {}
    if best != UNTUNED:
        final = compare(UNTUNED, best, time_call, 2 * _TURNS)
        note(f"{UNTUNED} -> {best}, again: {final}")
        if final.gains:
            us = final.us
        else:
            reasons.append(f"{best} gained nothing when it was timed again")
            best = UNTUNED
    seconds = round(clock() - start, 2)
    return Tuned(heads, best, us, tried, seconds, "; ".join(reasons))


def _thinned(
    best: Tuning, time_call: TimeCall, hold: Hold, note: Callable[[str], None]
) -> Tuning:
    """Without the changes that gain nothing when they are timed again."""
    for name in best.changes:
        nothing: dict[str, Any] = {name: None}
        without = replace(best, **nothing)
        hold(without)
        comparison = compare(without, best, time_call)
        note(f"{without} -> {best}, again: {comparison}")
        if not comparison.gains:
            best = without
    return best


def compare(
    one: Tuning, other: Tuning, time_call: TimeCall, most_turns: int = _TURNS
) -> Comparison:
    """Time two by turns, to the end or until the other is known to gain nothing."""
    seconds: dict[int, list[tuple[float, float]]] = {n: [] for n in LENGTHS}
    comparison = Comparison(seconds)
    for turn in range(most_turns):
        for tokens, turns in seconds.items():
            # Who is first finds the machine as the last one left it.
            first, second = (one, other) if turn % 2 else (other, one)
            times = {first: time_call(first, tokens)}
            times[second] = time_call(second, tokens)
            turns.append((times[one], times[other]))
        if turn + 1 == _FEW_TURNS and not _may_gain(seconds):
            break
    return comparison


def _may_gain(seconds: dict[int, list[tuple[float, float]]]) -> bool:
    """Whether the best turn of any length was a gain."""
    return any(min(b / a for a, b in turns) <= 1 - GAIN for turns in seconds.values())


def _median_us(seconds: Iterable[float]) -> float:
    return round(1e6 * statistics.median(seconds), 2)

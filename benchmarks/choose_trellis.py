"""Choose what the trellis computes levels by: `FORMULAS` of codecs/trellis_levels.py.

    python benchmarks/choose_trellis.py            # all rates; minutes each
    python benchmarks/choose_trellis.py --rates 3

Every multiplier that tells all windows apart is tried for even elements, then for odd
ones, twice; behind both, bend, slope and gain take random steps that shrink. The error
is of Gaussian vectors on a sphere with least-squares scales; the best few are measured
on more of them. Seeds are fixed. What a line says is then moved by a step or two of
bend and slope to where no level is near a tie of rounding (tests/test_trellis.py).
"""

import argparse
import random

import mlx.core as mx
import numpy as np

from mlx_turboquant.codecs import codec_info, viterbi
from mlx_turboquant.codecs.trellis_levels import FORMULAS, WINDOW, window_levels

DIM, SEARCH_PEAK = 128, 254
FEW, MANY, LAST = 250, 1500, 8192  # vectors
STEPS, FINENESS = 25, 128
#: Products of all windows with these lie between two powers of two.
MULTIPLIERS = range(1024, 1640)


def on_sphere(count, seed):
    """Vectors of mean square 1: (count, DIM)."""
    x = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return x * (DIM**0.5 / np.linalg.norm(x, axis=1, keepdims=True))


def levels_of(multipliers, shape):
    """Levels (2, 256) of a shape: bend, slope, root of their mean square."""
    bend, slope, size = shape
    levels = np.stack([window_levels(m, bend, slope) for m in multipliers])
    return levels * (size / np.sqrt((levels**2).mean()))


def error_of(widths, multipliers, shape, x):
    """Relative squared error of x (N, DIM)."""
    levels = levels_of(multipliers, shape)
    step = np.abs(levels).max() / SEARCH_PEAK
    searched = np.round(levels / step).astype(np.float32)[::-1].copy()
    graph = viterbi.TrellisGraph(WINDOW, widths[::-1], searched)
    target = np.clip(np.round(x / step), -viterbi.CLIP, viterbi.CLIP)
    windows = np.array(viterbi.best_windows(graph, mx.array(target)))
    y = levels[np.arange(DIM) % 2, windows]
    scale = (x * y).sum(-1, keepdims=True) / (y * y).sum(-1, keepdims=True)
    return float(((scale * y - x) ** 2).sum() / (x * x).sum())


def refined(widths, multipliers, shape, x, rng):
    """The best of some shapes around one."""
    best, spread = (error_of(widths, multipliers, shape, x), shape), 0.08
    for _ in range(STEPS):
        bend, slope = (
            round(number * (1 + rng.gauss(0, spread)) * FINENESS) / FINENESS
            for number in best[1][:2]
        )
        near = (bend, slope, best[1][2] * (1 + rng.gauss(0, spread / 3)))
        error = error_of(widths, multipliers, near, x)
        if error < best[0]:
            best = (error, near)
        else:
            spread = max(0.9 * spread, 0.015)
    return best[1]


def choose(rate):
    """A line about the formula of one rate; it begins with the one that is there."""
    formula = FORMULAS[rate]
    widths, best = formula.widths, list(formula.multipliers)
    size = formula.step * float(np.sqrt((formula.levels**2).mean()))
    shape = (formula.bend, formula.slope, size)
    few, many, rng = on_sphere(FEW, 1), on_sphere(MANY, 2), random.Random(0)
    choices = [m for m in MULTIPLIERS if len(set(window_levels(m, 0.25, 0.75))) == 256]
    for turn in (0, 1, 0, 1):
        tried = [[m if t == turn else best[t] for t in (0, 1)] for m in choices]
        errors = [error_of(widths, both, shape, few) for both in tried]
        some = [tried[i] for i in np.argsort(errors)[:3]]
        best = min(some, key=lambda both: error_of(widths, both, shape, many))
        if turn == 1:
            shape = refined(widths, best, shape, many, rng)
    bend, slope, size = shape
    plain = np.stack([window_levels(m, bend, slope) for m in best]) / 4096
    gain = size / np.sqrt((plain**2).mean())
    error = error_of(widths, best, shape, on_sphere(LAST, 999))
    return (
        f"{rate:g} bits: multipliers {best}, bend {bend * FINENESS:g} / {FINENESS}, "
        f"slope {slope * FINENESS:g} / {FINENESS}, gain {gain:.4g}, error {error:.5f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    rates = codec_info("trellis").widths
    parser.add_argument("--rates", type=float, nargs="*", default=rates)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    for rate in args.rates:
        print(choose(rate), flush=True)


if __name__ == "__main__":
    main()

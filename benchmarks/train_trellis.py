"""Train the trellis codec's tables and write ``mlx_turboquant/data/trellis.json``.

    python benchmarks/train_trellis.py            # all rates, 12 minutes on 2 cores
    python benchmarks/train_trellis.py --rates 3 --out /tmp/trellis.json

Generalised Lloyd: search the best windows for fresh Gaussian vectors, move every level
to the mean of what it stood for, again. Levels begin as a random order of Gaussian
quantiles and are shaken less and less; of a few beginnings the best goes on for longer.
The top bit of a window negates, so half a table is trained. Seeds are fixed; the result
is rounded to whole numbers -127..127 of one unit.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_turboquant.codecs import codec_info, viterbi

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "mlx_turboquant" / "data" / "trellis.json"
WINDOW, DIM = 8, 128
HALF = 1 << (WINDOW - 1)
BEGINNINGS, SHORT, LONG = 24, (60, 384), (480, 1536)  # rounds, vectors in each


def widths_of(rate):
    """Own bits by turn: even elements first."""
    low = int(rate)
    return (low,) if rate == low else (low + 1, low)


def graph_of(rate, levels):
    both = np.concatenate([levels, -levels], axis=1).astype(np.float32)
    return viterbi.TrellisGraph(WINDOW, widths_of(rate)[::-1], both[::-1])


def beginning(rate, seed):
    """Quantiles of |x| in a random order with random signs: (turns, 128)."""
    rng = np.random.default_rng(seed)
    sample = np.sort(np.abs(np.random.default_rng(0).standard_normal(1 << 20)))
    quantiles = sample[((np.arange(HALF) + 0.5) / HALF * len(sample)).astype(int)]
    turns = len(widths_of(rate))
    signs = rng.choice([-1.0, 1.0], size=(turns, HALF))
    return np.stack([quantiles[rng.permutation(HALF)] for _ in range(turns)]) * signs


def search(rate, levels, x):
    """Windows of x (N, DIM), and the relative error with least-squares scales."""
    windows = np.array(viterbi.best_windows(graph_of(rate, levels), mx.array(x)))
    both = np.concatenate([levels, -levels], axis=1)
    turns = len(levels)
    y = np.stack([both[i % turns][windows[:, i]] for i in range(DIM)], axis=1)
    scale = (x * y).sum(-1, keepdims=True) / (y * y).sum(-1, keepdims=True)
    return windows, float(((scale * y - x) ** 2).sum() / (x * x).sum())


def train(rate, levels, rounds, count, seed, shake):
    """Levels after so many rounds; the last fifth are averaged."""
    turns = len(levels)
    total, weight = np.zeros_like(levels), np.zeros_like(levels)
    rng = np.random.default_rng(seed)
    for at in range(rounds):
        x = rng.standard_normal((count, DIM)).astype(np.float32)
        windows, _ = search(rate, levels, x)
        keep = 0.9 if at >= 0.8 * rounds else 0.0
        total, weight = total * keep, weight * keep
        for turn in range(turns):
            sign = np.where(windows[:, turn::turns] >= HALF, -1.0, 1.0).ravel()
            place = (windows[:, turn::turns] % HALF).ravel()
            weight[turn] += np.bincount(place, minlength=HALF)
            signed = sign * x[:, turn::turns].ravel()
            total[turn] += np.bincount(place, signed, minlength=HALF)
        levels = np.where(weight > 0.5, total / np.maximum(weight, 1e-9), levels)
        if at < 0.6 * rounds:
            fade = shake * (1 - at / (0.6 * rounds))
            levels = levels + fade * rng.standard_normal(levels.shape)
    return levels


def on_sphere(count, seed):
    x = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return x * (DIM**0.5 / np.linalg.norm(x, axis=1, keepdims=True))


def table_of(rate):
    """The entry of one rate."""
    shake = 0.12 if rate <= 2 else 0.05
    check = on_sphere(800, 4242)
    beginnings = []
    for seed in range(BEGINNINGS):
        levels = train(rate, beginning(rate, seed), *SHORT, 50 + seed, shake)
        beginnings.append((search(rate, levels, check)[1], seed, levels))
    best = min(beginnings, key=lambda entry: entry[:2])[2]
    levels = train(rate, best, *LONG, 200, shake / 4)
    unit = float(f"{np.abs(levels).max() / 127:.6g}")
    whole = np.round(levels / unit).astype(int)
    error = search(rate, whole * unit, on_sphere(4000, 999))[1]
    print(f"{rate:g} bits: {error:.5f}", file=sys.stderr, flush=True)
    return {"unit": unit, "levels": whole.tolist(), "mse": round(error, 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rates", type=float, nargs="*", default=codec_info("trellis").widths
    )
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        entries = list(pool.map(table_of, args.rates))
    about = "Levels in units by 7-bit window, even elements first; train_trellis.py"
    rows = ",\n".join(
        f"  {json.dumps(f'{rate:g}')}: {json.dumps(entry)}"
        for rate, entry in zip(args.rates, entries, strict=True)
    )
    beside = args.out.with_suffix(".new")
    beside.write_text(f'{{"about": {json.dumps(about)},\n "tables": {{\n{rows}\n}}}}\n')
    beside.replace(args.out)


if __name__ == "__main__":
    main()

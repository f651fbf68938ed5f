"""What ideas of other papers would gain on the bundled model's keys and values.

``python benchmarks/bench_neighbours.py`` takes 2,048 tokens of held-out books through
the model and says, in bits per element, what an idea saves at equal error and what it
has to store for that; both over vectors whose page means are taken off (``page``
tokens, 16 bits a channel: stored today, for keys). Half a bit is a factor of two in
squared error. Shares are means over layers and heads.

* low rank: the best rank-r approximation of a block of n tokens, kept beside codes of
  the rest (eOptShrinkQ; truncation keeps more energy than shrinkage)
* delta: the last token's vector times the best factor, taken off (predictive coding)
* mixture: bits by water-filling at 2 bits in the Karhunen-Loeve basis of the
  nearest of K centres, learned on the first half, used on the second (PrismQuant; K = 1
  is plain KLT)
* token norms, per-channel INT2 after a rotation (OScaR), against `turboquant`'s error
"""

import numpy as np

import mlx_turboquant as tq  # isort: skip
import mlx.core as mx

from mlx_turboquant.evals import text
from mlx_turboquant.evals.caches import cache_factory
from mlx_turboquant.evals.needles import read
from mlx_turboquant.rotation import rotation_for

PAGE, TOKENS, RATE = 128, 2048, 2
rng = np.random.default_rng(0)


def power(x):
    return float(np.mean(x**2))


def saved(before, after):
    return 0.5 * np.log2(power(before) / power(after))


def centred(x):
    pages = x.reshape(-1, PAGE, x.shape[1])
    return (pages - pages.mean(1, keepdims=True)).reshape(x.shape)


def low_rank(x, block, rank):
    """Bits saved over page means, of which this needs none, and bits of the factors."""
    rest = []
    for part in x.reshape(-1, block, x.shape[1]):
        u, s, v = np.linalg.svd(part, full_matrices=False)
        rest.append(part - (u[:, :rank] * s[:rank]) @ v[:rank])
    cost = 16 * rank * (1 / block + 1 / x.shape[1]) - 16 / PAGE
    return saved(centred(x), np.concatenate(rest)), cost


def delta(x):
    x = centred(x)
    now, last = x[1:], x[:-1]
    factor = np.sum(now * last) / np.sum(last**2)
    return saved(now, now - factor * last), saved(now, now - last)


def water(variances):
    """Error of the best allocation of RATE bits an element, by bisection."""
    low, high = 1e-12, float(variances.max())
    for _ in range(60):
        level = (low * high) ** 0.5
        rate = np.mean(0.5 * np.log2(np.maximum(variances / level, 1)))
        low, high = (level, high) if rate > RATE else (low, level)
    return np.mean(np.minimum(variances, level))


def mixture(x, count):
    x = centred(x)
    learn, use = x[: TOKENS // 2], x[TOKENS // 2 :]
    centres = (
        learn[rng.choice(len(learn), count, replace=False)]
        if count > 1
        else (learn.mean(0, keepdims=True))
    )
    for _ in range(20):
        own = nearest(learn, centres)
        centres = np.stack(
            [
                learn[own == k].mean(0) if (own == k).any() else c
                for k, c in enumerate(centres)
            ]
        )
    own, used = nearest(learn, centres), nearest(use, centres)
    error, plain = 0.0, power(use) * 2.0 ** (-2 * RATE)
    for k, centre in enumerate(centres):
        part, known = use[used == k] - centre, learn[own == k] - centre
        if len(part):
            spread = known.T @ known / max(1, len(known)) + 1e-4 * np.eye(x.shape[1])
            _, basis = np.linalg.eigh(spread)
            error += len(part) / len(use) * water(np.mean((part @ basis) ** 2, 0))
    return 0.5 * np.log2(plain / error), np.log2(count) / x.shape[1]


def nearest(x, centres):
    far = np.sum(centres**2, 1) - 2 * x @ centres.T
    return far.argmin(1)


def per_channel_int2(x):
    """Relative error of INT2 by channel and page, of rotated tokens of norm one."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    rotated = np.array(rotation_for(x.shape[1], 0, None).forward(mx.array(x / norms)))
    pages = rotated.reshape(-1, PAGE, x.shape[1])
    low, high = pages.min(1, keepdims=True), pages.max(1, keepdims=True)
    step = (high - low) / 3
    decoded = (low + step * np.round((pages - low) / step)).reshape(x.shape)
    return np.sum((norms * (decoded - rotated)) ** 2) / np.sum(centred(x) ** 2)


def turboquant(x, side):
    codec = tq.codec_for(tq.CodecSpec.of("turboquant", 2), x.shape[1], side)
    x_rot = codec.rotation.forward(mx.array(centred(x)))[None, None]
    wrong = codec.decode(codec.encode(x_rot), mx.float32) - x_rot
    return float(mx.sum(wrong**2) / mx.sum(x_rot**2))


def main():
    model, tokenizer = tq.load("examples/books-20m")
    cache = cache_factory("fp", model)()
    read(model, text.windows(text.books(), tokenizer, TOKENS, 1)[0], cache, 512)
    sides = {
        side: [
            head
            for layer in cache
            for head in np.array(getattr(layer, side)[0, :, :TOKENS].astype(mx.float32))
        ]
        for side in ("keys", "values")
    }
    print(f"{'':34}{'saves':>8}{'costs':>8}{'gains':>8}")
    for side, heads in sides.items():
        rows = {
            f"low rank {r} of {n} tokens": [low_rank(x, n, r) for x in heads]
            for n in (512, 2048)
            for r in (1, 4, 8)
        }
        rows["delta, best factor"] = [(delta(x)[0], 0) for x in heads]
        rows["delta, factor 1"] = [(delta(x)[1], 0) for x in heads]
        rows |= {
            f"mixture of {k} at 2 bits": [mixture(x, k) for x in heads]
            for k in (1, 4, 8)
        }
        for name, found in rows.items():
            gain, cost = np.mean(found, 0)
            print(f"{side + ', ' + name:34}{gain:8.2f}{cost:8.2f}{gain - cost:8.2f}")
        int2 = np.mean([per_channel_int2(x) for x in heads])
        ours = np.mean([turboquant(x, side) for x in heads])
        bits = RATE + 32 / PAGE + 16 / heads[0].shape[1]
        print(f"{side}, OScaR-like INT2, {bits:.3f} bits: relative error {int2:.3f}")
        print(f"{side}, turboquant k2v2, 2.125 bits: relative error {ours:.3f}")


if __name__ == "__main__":
    main()

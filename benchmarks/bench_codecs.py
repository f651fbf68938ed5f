"""Every codec at some bits: errors, cost, and what it does to a model.

    python benchmarks/bench_codecs.py                  # the table of docs/codecs.md
    python benchmarks/bench_codecs.py --quick          # without the model

Vectors: 128 Gaussian coordinates, keys and values of a made-up head of 2,048 tokens
whose queries look at two of them each. "error" is the relative squared error of values,
"bias" and "noise" are of inner products of keys with queries that resemble them (noise
over |q| |k| / sqrt(d)), "output" is the relative error of attention's output. Times are
of this machine, per vector.

Model: the bundled one on held-out books, every token through the real caches without
window or sink (pages of 64, keys centred where the codec gains from it), KL divergence
to its own uncompressed cache as it is and transformed to have a cache that is hard
(`evals.pathologies`). Bits are everything stored. The plot needs ``.[plots]``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import mlx_turboquant as tq  # before MLX: on Linux it loads a faster BLAS

# isort: split
import mlx.core as mx
import numpy as np

from mlx_turboquant.codecs import codec_for

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "books-20m"
RESULTS = ROOT / "benchmarks" / "results"
DIM, TOKENS, QUERIES = 128, 2048, 64
SPECS = (
    "k2v2",
    "k3v2",
    "k3v3",
    "k4v3",
    "k4v4",
    "k2v2,codec=research.turboquant-plain",
    "k3v3,codec=research.turboquant-plain",
    "k4v3,codec=research.turboquant-plain",
    "k4v4,codec=research.turboquant-plain",
    "k3v3,codec=research.turboquant-eden",
    "k3v3,codec=research.turboquant-drive",
    "k3v3,codec=research.turboquant-prod",
    "k4v4,codec=research.turboquant-prod",
    "k2.25v2.25,codec=research.turboquant-outlier",
    "k3.5v3.5,codec=research.turboquant-outlier",
    "k2v2,codec=trellis",
    "k2.5v2.5,codec=trellis",
    "k3v3,codec=trellis",
    "k3.5v3.5,codec=trellis",
    "k4v4,codec=trellis",
    "k3.5v3,codec=research.turboangle",
    "k2.5v2.5,codec=research.turboangle-fixed",
    "k3v3,codec=research.turboangle-fixed",
    "k4v4,codec=research.turboangle-fixed",
    "k3.875v3.875,codec=research.polarquant",
    "k4v4,codec=rotated-int4",
    "k3v3,codec=research.hqmq",
    "k3v3,codec=research.residual",
    "k4v4,codec=research.residual",
    "k3v3,codec=research.affine",
    "k4v4,codec=research.affine",
    "k3v3,codec=research.qjl",
    "k8v3,codec=research.qjl",
    "k8v3,codec=research.jl",
)
BARE = "window=0,sink=0,page=64"
PATHOLOGIES = ("offset 10", "value tails")


def made_up_head() -> tuple[mx.array, mx.array, mx.array]:
    """Keys, values (1, 1, TOKENS, DIM), and queries that look at two keys each."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((TOKENS, DIM)) * np.exp(
        0.15 * rng.standard_normal((TOKENS, 1))
    )
    values = rng.standard_normal((TOKENS, DIM)) * np.exp(
        0.3 * rng.standard_normal((TOKENS, 1))
    )
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    queries = []
    for _ in range(QUERIES):
        seen = unit[rng.choice(TOKENS, 2, replace=False)].sum(0)
        seen /= np.linalg.norm(seen)
        rest = rng.standard_normal(DIM)
        rest -= seen * (rest @ seen)
        rest /= np.linalg.norm(rest)
        queries.append(2 * np.sqrt(DIM) * (0.5 * seen + np.sqrt(0.75) * rest))
    return tuple(
        mx.array(np.asarray(x, dtype=np.float32))[None, None]
        for x in (keys, values, queries)
    )


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=DIM**-0.5)


def on_vectors(text: str) -> dict[str, float]:
    """Errors and times of one spec."""
    spec = tq.CacheSpec.parse(text)
    keys, values, queries = made_up_head()
    decoded, seconds, bits = [], [0.0, 0.0], 0.0
    for x, codec_spec, side in (
        (keys, spec.keys, "keys"),
        (values, spec.values, "values"),
    ):
        codec = codec_for(codec_spec, DIM, side)
        x_rot = codec.rotation.forward(x)
        mx.eval(x_rot)
        for _ in range(2):  # the first one solves codebooks
            start = time.perf_counter()
            codes = codec.encode(x_rot)
            mx.eval(*codes.arrays.values())
            middle = time.perf_counter()
            got = codec.decode(codes, mx.float32)
            mx.eval(got)
            end = time.perf_counter()
        seconds[0] += middle - start
        seconds[1] += end - middle
        decoded.append(codec.rotation.inverse(got))
        bits += codec.bits_per_vector / DIM / 2
    k, v = decoded
    near = keys + mx.random.normal(keys.shape, key=mx.random.key(1))
    truth, got = mx.sum(near * keys, -1), mx.sum(near * k, -1)
    lengths = mx.linalg.norm(near, axis=-1) * mx.linalg.norm(keys, axis=-1)
    slope = mx.sum(got * truth) / mx.sum(truth * truth)
    noise = mx.std((got - slope * truth) / lengths) * DIM**0.5
    want = attend(queries, keys, values)
    out = attend(queries, k, v)
    error = mx.sum((v - values) ** 2) / mx.sum(values**2)
    moved = mx.sqrt(mx.sum((out - want) ** 2) / mx.sum(want**2))
    return {
        "bits": bits,
        "error": error.item(),
        "bias": slope.item() - 1,
        "noise": noise.item(),
        "output": moved.item(),
        "encode_us": seconds[0] / 2 / TOKENS * 1e6,
        "decode_us": seconds[1] / 2 / TOKENS * 1e6,
    }


def on_model(specs: tuple[str, ...], windows: int) -> dict[str, dict[str, float]]:
    """KL divergences by spec, and the bits stored."""
    model, tokenizer = tq.load(str(MODEL))
    names = [f"{spec},{BARE}" for spec in specs]
    plan = tq.EvalPlan(
        lengths=(768,),
        windows=windows,
        seeds=1,
        scored=256,
        stepped=0,
        needles=(),
        greedy=0,
    )
    report = tq.evaluate(
        model,
        tokenizer,
        names,
        baselines=("affine:4",),
        plan=plan,
        pathology=PATHOLOGIES,
    )
    rows: dict[str, dict[str, float]] = {}
    for kind in ("", *PATHOLOGIES):
        for row, spec in zip(report.rows(kind), ("mlx-lm 4", *specs), strict=True):
            scores = rows.setdefault(spec, {"model_bits": row.bits})
            scores[kind or "as it is"] = row.kld
    return rows


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_codec: dict[str, list[tuple[float, float]]] = {}
    for text, row in rows.items():
        if "as it is" in row:
            codec = text.partition("codec=")[2] or (
                "turboquant" if text[0] == "k" else text
            )
            by_codec.setdefault(codec, []).append((row["model_bits"], row["as it is"]))
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for marker, (codec, points) in enumerate(by_codec.items()):
        x, y = zip(*sorted(points), strict=True)
        style = "osD^vP*Xph<>d8H"[marker % 15]
        color = plt.get_cmap("tab20")(marker % 20)
        axes.plot(x, y, marker=style, color=color, label=codec, linewidth=1)
    axes.set(
        yscale="log",
        xlabel="bits stored per element, everything counted",
        ylabel="KL divergence to the uncompressed cache",
        title="books-20m, 768 tokens, no window, no sink",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncol=1, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--quick", action="store_true", help="vectors only")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = {text: on_vectors(text) for text in options.specs}
    if not options.quick:
        for text, scores in on_model(tuple(options.specs), options.windows).items():
            rows.setdefault(text, {}).update(scores)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{'':36}" + "".join(f"{name:>15}" for name in columns))
    for text, row in rows.items():
        cells = (f"{row[n]:.4g}" if n in row else "" for n in columns)
        print(f"{text:36}" + "".join(f"{cell:>15}" for cell in cells))
    options.out.mkdir(exist_ok=True)
    (options.out / "codecs.json").write_text(json.dumps(rows, indent=1) + "\n")
    if not options.quick:
        plot(rows, options.out / "codecs.png")


if __name__ == "__main__":
    main()

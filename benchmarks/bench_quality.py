"""What every cache costs in quality on the held-out books, at equal text.

Teacher-forced through the real caches in chunks of 64 tokens; each chunk sees
itself and the recent window uncompressed, everything older as codes. Bits are all
stored bits over all elements at the window's full length. The last line is JSON.

    python benchmarks/bench_quality.py [LENGTH [WINDOWS [SPEC ...]]]
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict

from mlx_turboquant.blas import prefer_openblas

prefer_openblas()

import mlx.core as mx  # noqa: E402
from quality import MODEL, affine, compare, log_probs, ours, stock, windows  # noqa: E402

import mlx_turboquant as tq  # noqa: E402

SPECS = ("8", "4", "3.5", "3", "2.5", "2", "3,center=off", "3,window=0,sink=0,page=16")
CHUNK, HEAD = 64, 256


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    model, tokenizer = tq.load(str(MODEL))
    texts = windows(tokenizer, length, count)
    base = [log_probs(model, text, stock(model), CHUNK, HEAD) for text in texts]
    kinds = {"fp": stock} | {f"mlx-lm kv_bits={b}": affine(b) for b in (8, 4, 3, 2)}
    kinds |= {f"ours {spec}": ours(spec) for spec in sys.argv[3:] or SPECS}
    print(
        f"{'cache':32s} {'bits':>6s} {'KLD':>9s} {'p99':>8s} {'top-1':>7s} {'ppl':>8s}"
    )
    rows = {}
    for name, make in kinds.items():
        score = compare(model, texts, base, make, CHUNK, HEAD)
        rows[name] = asdict(score)
        print(
            f"{name:32s} {score.bits:6.3f} {score.kld:9.6f} {score.kld_p99:8.4f} "
            f"{score.top1:7.4f} {score.perplexity:8.3f}",
            flush=True,
        )
    where = {
        "machine": platform.machine(),
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "length": length,
        "windows": count,
    }
    print(json.dumps({**where, "rows": rows}))


if __name__ == "__main__":
    main()

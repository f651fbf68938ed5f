"""How much of a cache's quality survives keys and values that are hard to compress.

Rows: transforms of `pathology`, which leave the model's output as it is. Columns: KL
divergence of caches from the uncompressed one of the same transformed model. "fp" is
that model against the untransformed one: the noise of the arithmetic.

    python benchmarks/bench_pathology.py [LENGTH [WINDOWS [SPEC ...]]]
"""

from __future__ import annotations

import json
import sys

from mlx_turboquant.blas import prefer_openblas

prefer_openblas()

import mlx.core as mx  # noqa: E402
from pathology import NAMES, injected  # noqa: E402
from quality import MODEL, affine, compare, log_probs, ours, stock, windows  # noqa: E402

import mlx_turboquant as tq  # noqa: E402

SPECS = ("4", "3", "3,center=off")
CHUNK, HEAD = 64, 128


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    model, tokenizer = tq.load(str(MODEL))
    texts = windows(tokenizer, length, count)
    plain = [log_probs(model, text, stock(model), CHUNK, HEAD) for text in texts]
    kinds = {f"mlx-lm {bits}": affine(bits) for bits in (8, 4)}
    kinds |= {f"ours {spec}": ours(spec) for spec in sys.argv[3:] or SPECS}
    print(f"{'':16s}{'fp':>10s}" + "".join(f"{name:>18s}" for name in kinds))
    rows: dict[str, dict[str, float]] = {}
    for name in ("as it is", *NAMES):
        if name == "as it is":
            rows[name] = score(model, texts, plain, kinds)
        else:
            with injected(model, name):
                rows[name] = score(model, texts, plain, kinds)
        print(
            f"{name:16s}{rows[name]['fp']:10.1e}"
            + "".join(f"{rows[name][kind]:18.5f}" for kind in kinds),
            flush=True,
        )
    print(json.dumps({"mlx": mx.__version__, "length": length, "kld": rows}))


def score(model, texts, plain, kinds):  # type: ignore[no-untyped-def]
    """KL divergence by kind of cache, of the model as it now is."""
    base = [log_probs(model, text, stock(model), CHUNK, HEAD) for text in texts]
    found = {"fp": compare(model, texts, plain, stock, CHUNK, HEAD).kld}
    for kind, make in kinds.items():
        found[kind] = compare(model, texts, base, make, CHUNK, HEAD).kld
    return found


if __name__ == "__main__":
    main()

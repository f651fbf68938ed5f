"""Pages frozen and restored against reading their tokens again.

    python benchmarks/bench_cold.py [TOKENS [SPEC ...]]

The bundled model on held-out books: a predictor is fitted to pages of three texts, a
fourth is frozen page by page and restored at once, and must come back to the bit. Bytes
are of codes and scales; seconds are of the process's CPU, then of the clock. Set
OPENBLAS_NUM_THREADS=1: threads of numpy's own OpenBLAS spin between small products.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_turboquant as tq  # before MLX: on Linux it loads a faster BLAS

# isort: split
import mlx.core as mx
from cold_prediction import CodePredictor
from cold_records import freeze, restore

from mlx_turboquant.evals import text
from mlx_turboquant.integrations.hook import install
from mlx_turboquant.quantizer import Sides
from mlx_turboquant.tiles import in_vectors
from mlx_turboquant.tokens import TokenArrays

MODEL = Path(__file__).parent.parent / "examples" / "books-20m"
CHUNK = 2048


def timed(do: Callable[[], Any]) -> tuple[Any, str]:
    cpu, wall = time.process_time(), time.perf_counter()
    got = do()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return got, f"{cpu:.2f} s ({wall:.2f})"


def read(model: Any, tokens: list[int], spec: str) -> list[Any]:
    caches = tq.make_prompt_cache(model, spec)
    for start in range(0, len(tokens), CHUNK):
        model(mx.array(tokens[start : start + CHUNK])[None], cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


def codes_of(caches: list[Any]) -> list[Sides[TokenArrays]]:
    fetched = (cache.compressed() for cache in caches)
    return [Sides(*(in_vectors(side.packed) for side in sides)) for sides in fetched]


def page(layers: list[Sides[TokenArrays]], start: int, stop: int) -> list[Any]:
    return [
        Sides(
            *(
                TokenArrays({n: a[:, :, start:stop] for n, a in c.arrays.items()})
                for c in sides
            )
        )
        for sides in layers
    ]


def arrays_of(layers: list[Sides[TokenArrays]]) -> list[mx.array]:
    return [a for sides in layers for c in sides for a in c.views().values()]


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    model, tokenizer = tq.load(str(MODEL))
    install(model)
    *learned, tokens = text.windows(text.books(), tokenizer, length, 4)
    for spec in sys.argv[2:] or ["k3v3", "k4v4"]:
        texts = [codes_of(read(model, some, spec)) for some in learned]
        caches, prompt = timed(lambda spec=spec: read(model, tokens, spec))
        sides = [cache.compressed() for cache in caches]
        codecs = [Sides(k.quantizer.codec, v.quantizer.codec) for k, v in sides]
        predictor, fit = timed(
            lambda codecs=codecs, texts=texts: CodePredictor.fit(codecs, texts)
        )
        plain = codes_of(caches)
        count, size = plain[0].keys.length, caches[0].spec.page
        pages = [page(plain, at, at + size) for at in range(0, count, size)]
        records, froze = timed(lambda p=predictor, s=pages: [freeze(p, x) for x in s])
        got, restored = timed(lambda p=predictor, r=records: restore(p, r))
        pairs = list(zip(arrays_of(got), arrays_of(plain), strict=True))
        assert all(mx.array_equal(a, b).item() for a, b in pairs)
        nbytes, frozen = sum(b.nbytes for _, b in pairs), sum(map(len, records))
        weights = sum(array.nbytes for array in predictor.arrays.values())
        print(
            f"{spec} {count} codes: {nbytes} bytes, frozen {frozen} "
            f"({frozen / nbytes:.3f}), predictor {weights}; fit {fit}, freeze {froze}, "
            f"restore {restored}, reading the tokens {prompt}",
            flush=True,
        )


if __name__ == "__main__":
    main()

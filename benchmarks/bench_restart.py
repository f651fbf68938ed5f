"""What a restart costs: a text of ``--kv-dir`` against reading its prompt anew.

    python benchmarks/bench_restart.py 7000 30000 --shape 8b

A model of random weights reads a text, and a store writes it to a folder. A new store
finds it there, and 16 more tokens are read from it, as from a fork that was never
written. Each length is run several times: a machine's first prompt also builds kernels.
Files are in the page cache, as right behind a restart of the server alone.
"""

import argparse
import pathlib
import tempfile
import time

import mlx_turboquant as tq  # isort: skip

import mlx.core as mx
from bench_generate import made_up

from mlx_turboquant.integrations.prompt_store import PromptStore

CHUNK, NEW, DISK = 2048, 16, 20 * 10**9
KEY = ("made up", None, None)


def read(model, tokens, cache):
    """The last logits of a prompt, read as a server does."""
    ids = mx.array(tokens)[None]
    for start in range(0, len(tokens), CHUNK):
        logits = model(ids[:, start : start + CHUNK], cache=cache)[:, -1:]
        mx.eval(logits, [layer.state for layer in cache])
    return logits


def seconds(work):
    """What it returns, and how long it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def run(model, count, folder):
    """One line: a text of so many tokens, written and found again."""
    tokens = mx.random.randint(0, 32000, (count,)).tolist()
    more = tokens + mx.random.randint(0, 32000, (NEW,)).tolist()
    cache = model.make_cache()
    _, prefill = seconds(lambda: read(model, tokens, cache))
    fork = cache.fork()
    store = PromptStore(10, 1 << 40, tq.DiskFolder(folder, DISK, None))
    store.open(KEY, [model], model.make_cache())
    store.insert_cache(KEY, tokens, cache)
    _, written = seconds(store.close)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    want = read(model, more[count:], fork)
    again = PromptStore(10, 1 << 40, tq.DiskFolder(folder, DISK, None))
    again.open(KEY, [model], model.make_cache())

    def restore():
        found, rest = again.fetch_nearest_cache(KEY, more)
        mx.eval([layer.state for layer in found])
        return found, rest

    (found, rest), restored = seconds(restore)
    got, first = seconds(lambda: read(model, rest, found))
    again.close()
    held = sum(layer.nbytes for layer in cache)
    token = restored + first
    same = bool((got.argmax() == want.argmax()).item())
    return (
        f"{count:6} tokens: prefill {prefill:.3f} s, write {written:.2f} s, files "
        f"{size / 1e6:.0f} MB ({size / held:.3f} of the cache), restored "
        f"{restored:.3f} s, first token {token:.3f} s, {token / prefill:.1%} of the "
        f"prefill, {len(rest)} tokens read, same token {same}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--spec", default="k3v3")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    mx.random.seed(0)
    model = made_up(args.shape)
    tq.apply(model, args.spec)
    print(f"# MLX {mx.__version__}, {mx.default_device()}, {args.shape}, {args.spec}")
    for count in args.tokens:
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                print(run(model, count, pathlib.Path(folder)), flush=True)


if __name__ == "__main__":
    main()

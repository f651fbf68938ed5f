"""One rank of tests/test_distributed.py: its part of a model against all of it.

``mlx.launch -n 2 ... distributed_worker.py tensor|pipeline TYPE``
"""

import sys
import warnings

import mlx.core as mx
import tiny_models
from support_table import SPEC

import mlx_turboquant as tq


def main(mode, name):
    group = mx.distributed.init(strict=True, backend="ring")
    warnings.simplefilter("ignore")
    whole = tiny_models.build(name)
    want = tiny_models.logits(whole, tq.make_prompt_cache(whole, SPEC))
    part = tiny_models.build(name)
    if mode == "tensor":
        part.shard(group)
    else:
        part.model.pipeline(group)
    tq.apply(part, SPEC)
    caches = part.make_cache()
    got = tiny_models.logits(part, caches)
    error = mx.abs(got - want).max() / mx.std(want)
    packed = min(row.tokens[1] for row in tq.explain(caches).layers)
    keys = caches[0].compressed()[0]
    print(
        f"rank={group.rank()} error={error.item():.2e} caches={len(caches)} "
        f"heads={keys.shape[1]} packed={packed}",
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

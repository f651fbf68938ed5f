"""A Mac for caches to find, and caches of it."""

import mlx.core as mx
from helpers import attend

import mlx_turboquant as tq
from mlx_turboquant.backends.gpu import MAX_STEP, Gpu
from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.tiles import in_tiles


class Metal(Gpu):
    """Computes as the reference, and knows what it was asked."""

    def __init__(self):
        super().__init__(type("Launcher", (), {"name": "metal"})(), simdgroups=8)
        self.used, self.factor = [], 1

    def encode(self, quantizer, x, first):
        self.used.append("encode")
        return self.arranged(quantizer, quantizer.encode(x, first))

    def arranged(self, quantizer, codes):
        return in_tiles(codes, quantizer.layout)

    def attend(self, call):
        is_prompt = call.q.shape[2] > MAX_STEP
        return Reference().attend(call) if is_prompt else super().attend(call)

    def prepare(self, call):
        self.used.append("prepare")

        def step(call):
            self.used.append("step")
            return self.factor * Reference().attend(call)

        return step

    def channel_gains(self, x, centers=False, queries=None):
        return Reference().channel_gains(x, centers, queries)


def grow(cache, *steps):
    """Attention of each step."""
    outs = []
    for tokens in steps:
        kv = mx.random.normal((1, 2, tokens, 64)).astype(mx.float16)
        outs.append(attend(kv, *cache.update_and_fetch(kv, kv), 0.1))
    return outs


def cache_of(spec="k3v2", tokens=400):
    cache = tq.TurboQuantCache(spec)
    grow(cache, tokens, 1)
    return cache


def backend_of(cache):
    return tq.explain(cache).layers[0].backend

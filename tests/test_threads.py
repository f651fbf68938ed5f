"""Servers generate on a thread of their own: what is made once must serve them all."""

import threading

import mlx.core as mx
from cases import each_spec
from helpers import attend

import mlx_turboquant as tq


def run(spec, out, name):
    """A prompt, then steps, over a cache of this thread."""
    try:
        cache = tq.TurboQuantCache(f"{spec},page=32")
        got = []
        for count in (80, 1, 3):
            q, k, v = (
                mx.random.normal(
                    (1, heads, count, 64), key=mx.random.key(heads + count)
                )
                for heads in (4, 2, 6)
            )
            sides = cache.update_and_fetch(k, v[:, :2])
            got.append(attend(q, *sides, 0.125, "causal"))
            mx.eval(got[-1], cache.state)
        out[name] = (cache, mx.concatenate(got, axis=2))
        mx.eval(out[name][1])
    except Exception as error:
        out[name] = error


@each_spec
def test_caches_work_on_any_thread_and_move_between_them(spec):
    out = {}
    run(spec, out, "here")
    thread = threading.Thread(target=run, args=(spec, out, "there"))
    thread.start()
    thread.join()
    for result in out.values():
        if isinstance(result, Exception):
            raise result
    assert mx.array_equal(out["here"][1], out["there"][1]).item()
    # What the other thread made goes on here.
    k = mx.random.normal((1, 2, 1, 64))
    steps = [
        attend(mx.tile(k, (1, 2, 1, 1)), *c.update_and_fetch(k, k), 0.125)
        for c, _ in out.values()
    ]
    assert mx.array_equal(*steps).item()

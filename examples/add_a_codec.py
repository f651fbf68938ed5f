"""A codec of your own: rounding to equal steps, in a real model's cache.

What is above `main` is all that a codec needs, wherever that module lies.
"""

from pathlib import Path

import mlx_turboquant as tq
import mlx.core as mx
from mlx_lm import generate

from mlx_turboquant.codecs import Codec
from mlx_turboquant.packing import pack, unpack, words_per_vector
from mlx_turboquant.rotation import rotation_for

#: Best steps for a standard normal, by bits (Max, 1960).
STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352}


class Uniform(Codec):
    """Rotated coordinates in steps that are a fixed part of the vector's size."""

    arrays = ("words", "steps")

    def encode(self, x_rot):
        bits, x_rot = self.spec.bits, x_rot.astype(mx.float32)
        rms = mx.sqrt(mx.mean(x_rot * x_rot, axis=-1, keepdims=True))
        steps = (STEPS[bits] * rms).astype(mx.float16)
        codes = mx.floor(x_rot / mx.maximum(steps, 1e-7)) + 2 ** (bits - 1)
        words = pack(mx.clip(codes, 0, 2**bits - 1), bits)
        return tq.TokenArrays({"words": words, "steps": steps})

    def decode(self, codes, dtype, heads=slice(None)):
        numbers = unpack(codes.view("words", heads), self.spec.bits, self.dim)
        levels = numbers.astype(mx.float32) - (2**self.spec.bits - 1) / 2
        return (levels * codes.view("steps", heads)).astype(dtype)

    @property
    def bits_per_vector(self):
        return 32 * words_per_vector(self.spec.bits, self.dim) + 16


def build(spec, dim, side, seed):
    return Uniform(spec, dim, rotation_for(dim, seed))


tq.register_codec(tq.CodecInfo("uniform", tuple(STEPS), build))


def main():
    here = Path(__file__).parent
    model, tokenizer = tq.load(str(here / "books-20m"))
    cache = tq.make_prompt_cache(model, "3,codec=uniform")
    prompt = (here / "needle.txt").read_text()
    print(generate(model, tokenizer, prompt, max_tokens=8, prompt_cache=cache))
    print(tq.explain(cache))


if __name__ == "__main__":
    main()

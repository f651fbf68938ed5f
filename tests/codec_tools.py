"""What tests of codecs measure with."""

import mlx.core as mx

from mlx_turboquant.codecs import codec_for, codec_info
from mlx_turboquant.spec import CodecSpec


def vectors(dim, count=2000):
    """Rotated vectors of very different norms, (1, 2, count, dim)."""
    x = mx.random.normal((1, 2, count, dim))
    return x * mx.exp(mx.random.normal((1, 2, count, 1)))


def mse(codec, x):
    """Mean over vectors of the relative squared error."""
    got = codec.decode(codec.encode(x), mx.float32)
    error = mx.sum((x - got) ** 2, axis=-1) / mx.sum(x * x, axis=-1)
    return mx.mean(error).item()


def made(name, bits=None, dim=128, side="values", seed=0):
    """A codec by name, of its largest width unless said otherwise."""
    bits = bits or codec_info(name).widths[-1]
    return codec_for(CodecSpec.of(name, bits), dim, side, seed)

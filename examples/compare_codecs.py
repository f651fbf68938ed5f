"""How much of a vector each codec keeps, with every stored bit counted."""

import mlx_turboquant as tq
import mlx.core as mx

from mlx_turboquant.codecs import codec_info, codec_names

DIM = 128
mx.random.seed(0)
x = mx.random.normal((1, 1, 2000, DIM)) * mx.linspace(0.1, 3, DIM)

print(f"{'codec':12} bits stored  relative error (%)")
for name in codec_names():  # with research=True, of the comparisons too
    for bits in codec_info(name).widths:
        codec = tq.codec_for(tq.CodecSpec.of(name, bits), DIM, "values")
        x_rot = codec.rotation.forward(x)
        got = codec.rotation.inverse(codec.decode(codec.encode(x_rot), mx.float32))
        error = mx.sum((x - got) ** 2) / mx.sum(x**2)
        shown = f"{codec.bits_per_vector / DIM:11.3f}  {100 * error.item():.4f}"
        print(f"{name:12} {shown}")

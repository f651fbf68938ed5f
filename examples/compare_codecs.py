"""How much of a vector each bit width keeps, with every stored bit counted."""

import mlx.core as mx

import mlx_turboquant as tq

DIM = 128
mx.random.seed(0)
keys = mx.random.normal((1, 1, 4000, DIM)) * mx.linspace(0.1, 3, DIM)

print("bits stored  relative error (%)")
for bits in range(1, 9):
    codec = tq.codec_for(tq.CodecSpec("turboquant", bits), DIM, "values")
    keys_rot = codec.rotation.forward(keys)
    got = codec.rotation.inverse(codec.decode(codec.encode(keys_rot), mx.float32))
    error = mx.sum((keys - got) ** 2) / mx.sum(keys**2)
    print(f"{codec.bits_per_vector / DIM:11.3f}  {100 * error.item():.4f}")

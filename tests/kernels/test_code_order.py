"""The kernels that make tile order and decode it, against their definitions."""

import mlx.core as mx
import pytest
from helpers import relative_error

import mlx_turboquant as tq
from mlx_turboquant.backends.code_launches import materialize_launch, order_launch
from mlx_turboquant.backends.specialize import placeholder
from mlx_turboquant.codecs import codec_for
from mlx_turboquant.kernels.arguments import pack, pack_bytes
from mlx_turboquant.kernels.codes import MaterializeArguments, OrderArguments
from mlx_turboquant.tiles import tile_layout
from mlx_turboquant.tokens import TokenArrays

TABLES = {
    "trellis": (1, 1.5, 2, 2.5, 3, 3.5, 4),
    "research.turboangle-fixed": (2.5, 3, 3.5, 4),
    "research.turboangle": (2.5, 3, 4),
    "rotated-int4": (4,),
}
#: Codec, dim: whole units and a last one of two columns, padding and none.
SPECS = [
    *[(f"turboquant:{bits}", d) for bits in range(1, 9) for d in (33, 80, 128)],
    *[(f"{name}:{b}", d) for name in TABLES for b in TABLES[name] for d in (34, 80)],
    ("turboquant:8", 8),
    ("turboquant:3", 512),
    ("trellis:1", 64),
    ("trellis:1.5", 128),
    ("trellis:2", 96),
    ("trellis:3", 512),
    ("research.turboangle:4", 512),
]
each_spec = pytest.mark.parametrize(("spec", "dim"), SPECS)


def codec_of(spec, dim, side):
    name, _, bits = spec.partition(":")
    return codec_for(tq.CodecSpec.of(name, float(bits)), dim, side, 0)


def encoded(spec, dim, side, tokens, lead=(2, 3)):
    codec = codec_of(spec, dim, side)
    return codec, codec.encode(mx.random.normal((*lead, tokens, dim)))


def ordered(launcher, codec, side, codes):
    """Words and scales in tile order, made by the kernel."""
    words, scales = codes.arrays["words"], codes.arrays["scales"]
    batch, heads, tokens, _ = words.shape
    launch = order_launch(tile_layout(codec, side), batch, heads, tokens)
    return launcher(launch, [words, scales, pack(OrderArguments(tokens))])


def check_order(launcher, spec, dim, side, tokens):
    codec, codes = encoded(spec, dim, side, tokens)
    got = ordered(launcher, codec, side, codes)
    want = tile_layout(codec, side).to_tiles(*codes.arrays.values())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b).item()


@pytest.mark.parametrize("side", ["keys", "values"])
@each_spec
def test_order_is_the_definition(spec, dim, side, launcher):
    check_order(launcher, spec, dim, side, 41)


@pytest.mark.parametrize("case", ["turboquant:3", "trellis:2.5"])
def test_order_in_every_mode(case, launcher, mode):
    check_order(launcher, case, 80, "values", 33)


def check_decode(launcher, spec, dim, side, tokens, dtype=mx.float32):
    """All heads of a longer buffer, and one of them."""
    codec, codes = encoded(spec, dim, side, tokens + 40)
    layout = tile_layout(codec, side)
    words, scales = layout.to_tiles(*codes.arrays.values())
    codes = TokenArrays(codes.arrays, tokens)
    params = codec.kernel_format.exact_params
    none = [placeholder(mx.float16), mx.zeros((2, 3, 8, 8)), mx.zeros((2, 3, 8, 8))]
    for heads in (slice(0, 3), slice(1, 2)):
        count = heads.stop - heads.start
        arguments = MaterializeArguments(0, tokens, 0, count, heads.start, 3, 2, 1)
        dtypes = mx.float32, dtype
        launch = materialize_launch(layout, dtypes, arguments, False, False)
        inputs = [
            words,
            scales,
            pack_bytes(codes.tiles.tobytes()),
            params,
            *none,
            placeholder(),
        ]
        (got,) = launcher(launch, [*inputs, pack(arguments)])
        want = codec.decode(codes, dtype, heads)
        assert got.shape == want.shape == (2, count, tokens, dim)
        bound = 2e-6 if dtype == mx.float32 else 1e-3
        error = relative_error(got.astype(mx.float32), want.astype(mx.float32))
        assert error < bound


@pytest.mark.parametrize("side", ["keys", "values"])
@each_spec
def test_decode_is_the_definition(spec, dim, side, launcher):
    check_decode(launcher, spec, dim, side, 43)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_decode_to_model_dtypes(dtype, launcher):
    check_decode(launcher, "turboquant:3", 96, "values", 64, dtype)


@pytest.mark.parametrize("case", ["turboquant:3", "trellis:2.5"])
def test_decode_in_every_mode(case, launcher, mode):
    check_decode(launcher, case, 80, "keys", 33)

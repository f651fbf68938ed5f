import mlx.core as mx
import numpy as np
import pytest
from codec_tools import made

from mlx_turboquant.bitstream import BitStream
from mlx_turboquant.codecs.kernel_format import ANGLES, PAIRS, POLYNOMIAL, TRELLIS
from mlx_turboquant.packing import pack
from mlx_turboquant.tiles import TileLayout, in_tiles, in_vectors, tile_layout
from mlx_turboquant.tokens import TokenArrays

DIMS = (64, 72, 80, 96, 128, 192, 256, 512)
TOKENS = (1, 31, 32, 33, 100)
#: Bits and terms by kind, as codecs have them; their extremes included.
SHAPES = {
    POLYNOMIAL: [(bits, 2) for bits in range(1, 9)],
    PAIRS: [(bits, 0) for bits in range(1, 9)],
    TRELLIS: [(2, 1), (3, 2), (4, 2), (5, 3), (6, 3), (7, 4), (8, 4)],
    ANGLES: [(2, 4), (5, 4), (5, 8), (8, 8)],
}

each_kind = pytest.mark.parametrize("kind", SHAPES)
each_side = pytest.mark.parametrize("side", ["keys", "values"])
each_dim = pytest.mark.parametrize("dim", DIMS)


def random_codes(layout, tokens, lead=(2, 3)):
    """Codes of elements or pairs, zeros in a grid's padding, of all bits."""
    scalar = layout.kind == POLYNOMIAL
    count = layout.padded_dim if scalar else layout.padded_dim // 2
    rng = np.random.default_rng(tokens)
    codes = rng.integers(0, 2**layout.code_bits, (*lead, tokens, count))
    if scalar:
        codes[..., layout.dim :] = 0
    return codes


def vectors(layout, codes):
    """Words of ``codes`` in vector order, and scales."""
    scales = np.random.default_rng(1).normal(size=(*codes.shape[:3], layout.scales))
    scales = mx.array(scales.astype(np.float16))
    if layout.kind == POLYNOMIAL:
        return pack(mx.array(codes), layout.bits), scales
    own = BitStream((layout.bits,), codes.shape[-1])
    words = [own.pack(mx.array(codes % 2**layout.bits))]
    if layout.kind == ANGLES:
        norms = BitStream((layout.terms,), codes.shape[-1])
        words.append(norms.pack(mx.array(codes >> layout.bits)))
    return mx.concatenate(words, axis=-1), scales


@each_dim
@each_side
@each_kind
def test_vectors_come_back_exactly(kind, side, dim):
    for bits, terms in SHAPES[kind]:
        layout = TileLayout(kind, bits, terms, dim, side)
        for tokens in TOKENS:
            words, scales = vectors(layout, random_codes(layout, tokens))
            assert words.shape[-1] == layout.vector_words
            tile_words, tile_scales = layout.to_tiles(words, scales)
            tiles = -(-tokens // 32)
            assert tile_words.dtype == mx.uint32
            assert tile_scales.dtype == mx.float16
            assert tile_words.shape == (2, 3, tiles, layout.tile_words)
            assert tile_scales.shape == (2, 3, tiles, layout.tile_scales)
            got = layout.to_vectors(tile_words, tile_scales, tokens)
            assert mx.array_equal(got[0], words).item()
            assert mx.array_equal(got[1], scales).item()


@pytest.mark.parametrize("dim", [16, 40, 80, 96])
@each_side
@each_kind
def test_words_are_the_documented_ones(kind, side, dim):
    """A scalar restatement of the module's docstring, slot by slot."""
    for bits, terms in SHAPES[kind]:
        layout = TileLayout(kind, bits, terms, dim, side)
        codes = random_codes(layout, 45, (1, 1))
        words, _ = layout.to_tiles(*vectors(layout, codes))
        padded = np.zeros((64, codes.shape[-1]), dtype=int)
        padded[:45] = codes[0, 0]
        spelled = slots_of_elements if kind == POLYNOMIAL else slots_of_pairs
        for tile in (0, 1):
            slots = spelled(layout, padded[32 * tile :][:32].tolist())
            want = np.array(slots, dtype=np.uint32).T.reshape(-1)
            assert np.array_equal(np.array(words[0, 0, tile]), want)


def slots_of_elements(layout, codes):
    """Words of each slot of a tile, of its codes by token and element."""
    bits, columns = layout.bits, layout.padded_dim // 8
    slots = []
    for slot in range(32):
        major, minor = divmod(slot, 4)
        slots.append([])
        for first in range(0, columns, 4):
            width = min(4, columns - first)
            words = [0] * -(-4 * width * bits // 16)
            base = 1 if 16 % bits else 0
            top = base + 16 // bits * bits
            fields, spare = [], []
            for word in range(len(words)):
                for start in range(base, top, bits):
                    fields.append([(word, start + i) for i in range(bits)])
                if base:
                    spare += [(word, bit) for bit in (0, *range(top, 16))]
            while len(spare) >= bits:
                fields.append(spare[:bits])
                spare = spare[bits:]
            for column in range(first, first + width):
                for row in range(4):
                    field = fields.pop(0)
                    for high in (0, 1):
                        if layout.side == "keys":
                            token = 8 * row + major
                            element = minor * 2 * columns + 2 * column + high
                        else:
                            token = 8 * row + 2 * minor + high
                            element = major * columns + column
                        code = codes[token][element]
                        for i, (word, bit) in enumerate(field):
                            words[word] |= (code >> i & 1) << (bit + 16 * high)
            slots[-1] += words
    return slots


def slots_of_pairs(layout, codes):
    """Words of each slot of a tile, of its codes by token and pair."""
    columns = layout.padded_dim // 8
    slots = []
    for slot in range(32):
        major, minor = divmod(slot, 4)
        stream = []
        for first in range(0, columns, 4):
            stop = min(first + 4, columns)
            for row in range(4):
                if layout.side == "keys":
                    start = minor * columns
                    stream += codes[8 * row + major][start + first : start + stop]
                    continue
                for token in (8 * row + 2 * minor, 8 * row + 2 * minor + 1):
                    elements = range(major * columns + first, major * columns + stop, 2)
                    stream += [codes[token][element // 2] for element in elements]
        bits = layout.code_bits
        number = sum(code << (bits * i) for i, code in enumerate(stream))
        count = -(-bits * len(stream) // 32)
        slots.append([number >> (32 * i) & 0xFFFFFFFF for i in range(count)])
    return slots


@each_side
def test_scales_lie_by_slot(side):
    layout = TileLayout(ANGLES, 5, 8, 64, side)
    words, _ = vectors(layout, random_codes(layout, 40, (1, 1)))
    scales = mx.arange(1, 81, dtype=mx.float16).reshape(1, 1, 40, 2)
    got = np.array(layout.to_tiles(words, scales)[1])[0, 0]
    for token in range(64):
        row, major = divmod(token % 32, 8)
        for k in (0, 1):
            want = 1 + 2 * token + k if token < 40 else 0
            assert got[token // 32, 32 * k + 4 * major + row] == want


def test_whole_units_waste_no_bit():
    for bits in range(1, 9):
        for dim in (64, 96, 128, 512):
            layout = TileLayout(POLYNOMIAL, bits, 2, dim, "keys")
            assert layout.tile_words == 32 * layout.vector_words == dim * bits


@each_side
@pytest.mark.parametrize("dim", [34, 64, 80])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("turboquant", 3),
        ("rotated-int4", 4),
        ("trellis", 2),
        ("trellis", 2.5),
        ("research.turboangle", 3),
        ("research.turboangle-fixed", 2.5),
    ],
)
def test_a_codec_has_a_layout(name, bits, dim, side):
    codec = made(name, bits, dim, side)
    layout = tile_layout(codec, side)
    codes = codec.encode(mx.random.normal((1, 2, 35, dim))).arrays
    assert codes["words"].shape[-1] == layout.vector_words
    assert codes["scales"].shape[-1] == layout.scales
    got = layout.to_vectors(*layout.to_tiles(*codes.values()), 35)
    for a, b in zip(got, codes.values(), strict=True):
        assert mx.array_equal(a, b).item()


def test_a_codec_without_kernels_has_none():
    with pytest.raises(ValueError, match="has no kernel, so no tile order"):
        tile_layout(made("research.affine"), "keys")


LAYOUT = TileLayout(POLYNOMIAL, 3, 2, 40, "values")


def random_vectors(count, seed):
    """Codes of ``count`` tokens in vector order."""
    layout = LAYOUT
    codes = np.random.default_rng(seed).integers(0, 8, (2, 3, count, layout.padded_dim))
    codes[..., layout.dim :] = 0
    words, scales = vectors(layout, codes)
    return TokenArrays({"words": words, "scales": scales})


def same_codes(one, other):
    assert one.layout == other.layout
    assert one.length == other.length
    for name in ("words", "scales"):
        assert mx.array_equal(one.view(name), other.view(name)).item()


def test_orders_turn_into_each_other_and_stay_as_they_are():
    codes = random_vectors(70, 0)
    tiles = in_tiles(codes, LAYOUT)
    assert (tiles.layout, tiles.length) == (LAYOUT, 70)
    assert in_tiles(tiles, LAYOUT) is tiles
    same_codes(in_vectors(tiles), codes)
    same_codes(in_vectors(codes), codes)
    for order in (tiles, codes):
        of_a_head = in_vectors(order, slice(1, 2))
        assert of_a_head.length == 70
        for name, array in of_a_head.arrays.items():
            assert mx.array_equal(array, codes.arrays[name][:, 1:2]).item()

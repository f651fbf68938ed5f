"""Frozen pages: restored to the bit, as few bytes as theory says, refused in words."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("constriction")

from cold_prediction import CodePredictor
from cold_records import freeze, restore

from mlx_turboquant.codecs import codec_for
from mlx_turboquant.errors import FormatError
from mlx_turboquant.quantizer import Sides
from mlx_turboquant.spec import CodecSpec
from mlx_turboquant.tokens import TokenArrays

DIM = 32


def codecs_of(*bits, name="turboquant"):
    """Of each layer, from its (keys, values) bits."""
    return [
        Sides(
            *(
                codec_for(CodecSpec(name, b), DIM, side)
                for b, side in zip(pair, ("keys", "values"), strict=True)
            )
        )
        for pair in bits
    ]


def encoded(codecs, layers):
    """Codes of each layer's (keys, values), numpy (H, T, D)."""
    return [
        Sides(
            *(
                codec.encode(mx.array(x[None].astype(np.float32)))
                for codec, x in zip(sides, layer, strict=True)
            )
        )
        for sides, layer in zip(codecs, layers, strict=True)
    ]


def independent(seed, layers, heads=2, tokens=64):
    rng = np.random.default_rng(seed)
    shape = (layers, 2, heads, tokens, DIM)
    return list(rng.standard_normal(shape))


def related(seed, layers, tokens=64):
    """Vectors that one hidden vector of half as many elements makes."""
    rng = np.random.default_rng(seed)
    maps = np.random.default_rng(99).standard_normal((layers, 2, 2, DIM // 2, DIM))
    hidden = rng.standard_normal((tokens, DIM // 2))
    noise = 0.1 * rng.standard_normal((layers, 2, 2, tokens, DIM))
    return list(np.einsum("ti,lshid->lshtd", hidden, maps) / 4 + noise)


def cut(layers, start, stop):
    def one(codes):
        views = {name: a[:, :, start:stop] for name, a in codes.arrays.items()}
        return TokenArrays(views)

    return [Sides(*map(one, sides)) for sides in layers]


def same(got, wanted):
    return all(
        mx.array_equal(g.arrays[name], w.arrays[name]).item()
        for gs, ws in zip(got, wanted, strict=True)
        for g, w in zip(gs, ws, strict=True)
        for name in ("words", "scales")
    )


def code_bits(record, layers):
    """Bits of an element's code in a record, from its header: scales are apart."""
    size = int.from_bytes(record[16:20], "little")
    elements = sum(
        c.arrays["words"].shape[1] * c.arrays["words"].shape[2] * DIM
        for sides in layers
        for c in sides
    )
    return 8 * size / elements


@pytest.mark.parametrize("bits", [((3, 3), (3, 3)), ((4, 2), (1, 5), (3, 3))])
@pytest.mark.parametrize("vectors", [independent, related])
def test_pages_come_back_to_the_bit(bits, vectors):
    codecs = codecs_of(*bits)
    predictor = CodePredictor.fit(
        codecs, [encoded(codecs, vectors(0, len(bits), tokens=256))]
    )
    text = encoded(codecs, vectors(1, len(bits), tokens=96))
    pages = [cut(text, 0, 32), cut(text, 32, 96)]
    records = [freeze(predictor, page) for page in pages]
    assert same(restore(predictor, records), text)
    for record, page in zip(records, pages, strict=True):
        assert same(restore(predictor, [record]), page)


def test_independent_codes_cost_their_entropy():
    """No more than 2% above what their frequencies say, and not less."""
    codecs = codecs_of((3, 3))
    predictor = CodePredictor.fit(
        codecs, [encoded(codecs, independent(0, 1, tokens=4096))]
    )
    text = encoded(codecs, independent(1, 1, tokens=2048))
    entropies = []
    for codes, codec in zip(text[0], codecs[0], strict=True):
        levels = np.array(codec.codewords(codes.arrays["words"]))
        _, counts = np.unique(levels, return_counts=True)
        share = counts / counts.sum()
        entropies.append(-(share * np.log2(share)).sum())
    bits = code_bits(freeze(predictor, text), text)
    assert 0.99 * np.mean(entropies) < bits < 1.02 * np.mean(entropies)


def test_a_related_head_costs_what_is_left_over():
    """Its entropy given the other head's codes, within 3%."""
    codecs = codecs_of((3, 3))

    def texts(seed, tokens):
        one, other = np.random.default_rng(seed).standard_normal((2, 2, tokens, DIM))
        pair = np.stack([one, 0.9 * one + 0.436 * other], axis=1)
        return encoded(codecs, [pair])

    predictor = CodePredictor.fit(codecs, [texts(0, 4096)])
    text = texts(1, 4096)
    entropies = []
    for codes, codec in zip(text[0], codecs[0], strict=True):
        levels = np.array(codec.codewords(codes.arrays["words"]))[0]
        index = np.unique(levels, return_inverse=True)[1].reshape(levels.shape)
        both = np.zeros((8, 8))
        np.add.at(both, (index[0].ravel(), index[1].ravel()), 1)
        both /= both.sum()
        entropies.append(-(both[both > 0] * np.log2(both[both > 0])).sum() / 2)
    bits = code_bits(freeze(predictor, text), text)
    assert 0.97 * np.mean(entropies) < bits < 1.03 * np.mean(entropies)


def test_damage_is_told_from_pages():
    codecs = codecs_of((3, 3))
    text = encoded(codecs, independent(0, 1))
    predictor = CodePredictor.fit(codecs, [text])
    record = freeze(predictor, text)
    for at in range(0, len(record), 97):
        broken = bytearray(record)
        broken[at] ^= 16
        with pytest.raises(FormatError):
            restore(predictor, [bytes(broken)])
    for size in (0, 10, len(record) - 4):
        with pytest.raises(FormatError):
            restore(predictor, [record[:size]])
    other = CodePredictor.fit(codecs, [encoded(codecs, independent(5, 1))])
    with pytest.raises(FormatError, match="frozen by predictor"):
        restore(other, [record])
    with pytest.raises(FormatError, match="fit it again"):
        CodePredictor(codecs, [Sides(3, 3)], predictor.arrays)

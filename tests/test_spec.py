import pytest
from cases import each_codec
from hypothesis import given
from hypothesis import strategies as st

from mlx_turboquant.cli.options import cache_spec
from mlx_turboquant.codecs import codec_info, codec_names
from mlx_turboquant.errors import SpecError, TurboQuantError
from mlx_turboquant.spec import CENTERS, QUALITIES, CacheSpec, CodecSpec

bits = st.one_of(st.integers(1, 8), st.just(16))
all_names = codec_names(research=True)
value_names = [name for name in all_names if not codec_info(name).keys_only]


@given(st.sampled_from(all_names), st.sampled_from(value_names), st.data())
def test_every_pair_of_codecs_round_trips(k_name, v_name, data):
    k = data.draw(st.sampled_from([*codec_info(k_name).widths, 16]))
    v = data.draw(st.sampled_from(codec_info(v_name).widths))
    spec = CacheSpec(CodecSpec.of(k_name, k), CodecSpec.of(v_name, v))
    assert CacheSpec.parse(str(spec)) == spec == CacheSpec.parse(spec.full)


@each_codec
def test_a_codec_beside_uncompressed_values_round_trips(name):
    keys = CodecSpec.of(name, codec_info(name).widths[0])
    spec = CacheSpec(keys, CodecSpec("identity", 16))
    assert "/" not in str(spec)
    assert CacheSpec.parse(str(spec)) == spec == CacheSpec.parse(spec.full)


def test_codecs_of_keys_alone_leave_values_to_the_default_one():
    spec = CacheSpec.parse("3,codec=research.qjl")
    assert (spec.keys.name, spec.values.name) == ("research.qjl", "turboquant")
    assert str(spec) == "k3v3,codec=research.qjl"
    both = "k3v3,codec=research.qjl/trellis"
    assert str(CacheSpec.parse(both)) == both


specs = st.builds(
    lambda k, v, **kw: CacheSpec(
        CodecSpec.of("turboquant", k), CodecSpec.of("turboquant", min(v, 8)), **kw
    ),
    bits,
    bits,
    sink=st.integers(0, 1024),
    window=st.integers(0, 65536),
    page=st.integers(1, 32).map(lambda tiles: 32 * tiles),
    center=st.sampled_from(CENTERS),
    equalize=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


adaptive_specs = st.one_of(
    st.builds(CacheSpec.parse, st.just("auto"), quality=st.sampled_from(QUALITIES)),
    st.builds(CacheSpec.parse, st.just("auto"), budget=st.floats(2, 8)),
)


@given(adaptive_specs)
def test_bits_to_be_chosen_round_trip_too(spec):
    assert spec.adaptive
    assert CacheSpec.parse(str(spec)) == spec == CacheSpec.parse(spec.full)


def test_a_mean_that_is_no_half_step_is_a_budget():
    assert CacheSpec.parse(3.25) == CacheSpec.parse("auto,budget=3.25")
    assert str(CacheSpec.parse("3.25,window=64")) == "auto,window=64,budget=3.25"
    assert CacheSpec.parse("auto") == CacheSpec.parse("auto,quality=balanced")
    assert not CacheSpec.parse("3.5").adaptive


@given(specs)
def test_parse_inverts_str(spec):
    assert CacheSpec.parse(str(spec)) == spec == CacheSpec.parse(spec.full)


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        (3, (3, 3)),
        ("2.5", (3, 2)),
        (3.5, (4, 3)),
        ("k4v3", (4, 3)),
        ("K16V4", (16, 4)),
        (" 8 ", (8, 8)),
        ("auto", (3, 3)),
        ("3.5,codec=trellis", (3.5, 3.5)),
        ("k1.5v16,codec=trellis", (1.5, 16)),
        ("3.875,codec=research.polarquant", (3.875, 3.875)),
    ],
)
def test_sides(text, sides):
    spec = CacheSpec.parse(text)
    assert (spec.keys.bits, spec.values.bits) == sides


def test_overrides_win_and_none_leaves_alone():
    spec = CacheSpec.parse("k4v3,window=64", window=8, sink=None)
    assert (spec.window, spec.sink) == (8, 4)
    assert str(CacheSpec.parse(spec, page=32)) == "k4v3,window=8,page=32"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("9", "9 bits"),
        ("0", "0 bits"),
        ("-1", "-1 bits"),
        ("1.9", "1.9 bits on average"),
        ("8.3", "8.3 bits on average"),
        ("auto,quality=great", "quality=great"),
        ("auto,budget=many", "budget='many'"),
        ("auto,budget=3,quality=small", "quality=small and 3 bits"),
        ("3,quality=small", "'auto'"),
        ("3.25,quality=small", "3.25 bits"),
        ("nan", "nan"),
        ("1e9", "1e9"),
        ("three", "three"),
        ("", "''"),
        ("k4", "k4"),
        ("k16v16", "k16v16"),
        ("3,window=-1", "window -1"),
        ("3,page=8", "page 8"),
        ("3,page=48", "page 48 is not a multiple of 32; use 32"),
        ("3,center=first", "center=first"),
        ("3,sink=x", "sink='x'"),
        ("3,colour=red", "colour=red"),
        ("3,center=on", "center=on"),
        ("3,equalize=maybe", "equalize=maybe"),
        ("3,codec=qjl9", "qjl9"),
        ("3,codec=qjl", "its name is research.qjl"),
        ("3,codec=research.zip", "research.zip"),
        ("3,seed=-1", "seed -1"),
        ("3.2,codec=trellis/rotated-int4", "codec rotated-int4 cannot be chosen"),
        ("auto,codec=research.polarquant", "cannot be chosen"),
        ("5,codec=trellis", "trellis has no 5 bits per element; use 1, 1.5, 2"),
        ("3,codec=research.polarquant", "has no 3 bits per element; use 3.875"),
        ("3,codec=trellis/research.jl", "codec=research.jl/turboquant"),
    ],
)
def test_bad_text_names_the_value_and_a_way_out(text, names):
    with pytest.raises(SpecError) as caught:
        CacheSpec.parse(text)
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, TurboQuantError | ValueError)


@pytest.mark.parametrize("bits", ["3", "3.25", "k4v3", "auto,budget=3", "2,window=64"])
def test_a_quality_beside_bits_names_what_was_typed(bits):
    with pytest.raises(SpecError) as caught:
        cache_spec(bits, None, "small")
    said = str(caught.value)
    assert f"--kv-quality is for --kv-bits auto, and --kv-bits {bits} says" in said
    assert "budget= " not in said
    for option in ("quality=small", "budget=3"):
        with pytest.raises(SpecError, match=f"{option.partition('=')[0]}= is for bits"):
            CacheSpec.parse(f"3,{option}")
    assert cache_spec("auto,window=64", "trellis", "small") == CacheSpec.parse(
        "auto,window=64,codec=trellis,quality=small"
    )
    with pytest.raises(SpecError, match="--kv-quality tiny is none of lossless"):
        cache_spec("auto", None, "tiny")

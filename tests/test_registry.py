"""The registry: what codecs say of themselves, and who may register."""

import subprocess
import sys

import mlx.core as mx
import pytest
from cases import each_codec

import mlx_turboquant as tq
from mlx_turboquant.cli.options import KvCodec
from mlx_turboquant.codecs import codec_info, codec_names, registry
from mlx_turboquant.errors import SpecError

PRODUCT = {"turboquant", "trellis", "rotated-int4"}


@pytest.fixture
def registered(monkeypatch):
    """A copy of the registry that may be written to."""
    codec_names(research=True)
    monkeypatch.setattr(registry, "_infos", dict(registry._infos))
    yield
    registry.codec_for.cache_clear()


def test_names():
    assert set(codec_names()) == PRODUCT
    others = set(codec_names(research=True)) - PRODUCT
    assert len(others) == 13
    assert all(name.startswith("research.") for name in others)


def test_help_names_what_is_for_use():
    (option,) = KvCodec.__metadata__
    assert all(name in option.help for name in codec_names())
    names = codec_names(research=True)
    assert not any(name in option.help for name in names if name.startswith("research"))


@each_codec
def test_widths_ascend_and_choices_are_among_them(name):
    info = codec_info(name)
    assert list(info.widths) == sorted(set(info.widths))
    assert info.adaptive == (name in ("turboquant", "trellis"))
    assert (info.read_cost is not None) == (name in PRODUCT)
    if info.choices:
        bits, errors = zip(*((s.bits, e) for s, e in info.choices(128)), strict=True)
        assert list(bits) == sorted(bits)
        assert list(errors) == sorted(errors, reverse=True)
        for spec, _ in info.choices(64):
            assert spec.bits in codec_info(spec.name).widths


def test_looking_at_the_module_imports_nothing_heavy():
    code = (
        "import sys, mlx_turboquant.spec, mlx_turboquant.codecs; "
        "print([m for m in sys.modules if m == 'mlx.core' or '.research' in m])"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True) == "[]\n"


def test_everyday_names_do_not_import_the_comparisons():
    code = (
        "import sys, mlx_turboquant as tq; tq.CacheSpec.parse('3,codec=trellis'); "
        "print([m for m in sys.modules if '.research.' in m])"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True) == "[]\n"


def build(spec, dim, side, seed):
    return tq.codec_for(tq.CodecSpec("turboquant", spec.bits), dim, side, seed)


def test_a_registered_name_works_at_once_and_can_be_registered_again(registered):
    tq.register_codec(tq.CodecInfo("mine", (3,), build))
    spec = tq.CodecSpec("mine", 3)
    first = tq.codec_for(spec, 64, "keys")
    assert first is tq.codec_for(spec, 64, "keys")
    tq.register_codec(tq.CodecInfo("mine", (3, 4), build))
    assert tq.CodecSpec("mine", 4).bits == 4
    assert "mine" in codec_names()
    with pytest.raises(SpecError, match="mine has no 5 bits per element; use 3, 4"):
        tq.CodecSpec("mine", 5)
    with pytest.raises(SpecError, match="cannot be chosen from the text"):
        tq.CacheSpec.parse("auto,codec=mine")


@pytest.mark.parametrize("name", ["", "Mine", "my codec", "a/b", "a,b", "a=b"])
def test_names_that_specs_cannot_spell_are_refused(name, registered):
    with pytest.raises(SpecError, match="cannot be written in a spec"):
        tq.register_codec(tq.CodecInfo(name, (3,), build))


def test_a_taken_name_is_refused(registered):
    with pytest.raises(SpecError, match=r"taken by mlx_turboquant\.codecs\.trellis"):
        tq.register_codec(tq.CodecInfo("trellis", (3,), build))
    assert mx.array(codec_info("trellis").widths).size == 7


def test_a_built_in_name_is_taken_whoever_comes_first():
    """In a process that has looked nothing up yet."""
    code = (
        "import mlx_turboquant as tq\n"
        "try:\n"
        "    tq.register_codec(tq.CodecInfo('trellis', (1,), lambda *args: None))\n"
        "except ValueError as error: print(error)\n"
        "print(tq.CacheSpec.parse('3,codec=trellis'))"
    )
    run = [sys.executable, "-c", code]
    said = subprocess.check_output(run, text=True).splitlines()
    assert "'trellis' is taken by mlx_turboquant.codecs.trellis" in said[0]
    assert said[1] == "k3v3,codec=trellis"

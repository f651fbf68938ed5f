"""docs/format.md is true: its reader reads our files, and its examples run."""

import doctest
import re

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT, stored

import mlx_turboquant as tq
from mlx_turboquant.cache.state import FORMAT_VERSION
from mlx_turboquant.polynomial import coefficients

PAGE = (ROOT / "docs" / "format.md").read_text()


@pytest.fixture(scope="module")
def reader():
    """What the page's Python defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert len([line for line in code.splitlines() if line.strip()]) < 50
    names = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    return names


def test_the_changelog_has_every_version_of_the_format():
    """Under one heading, the newest first."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = [int(n) for n in re.findall(r"^- Version (\d+)", text, re.M)]
    assert versions == list(range(FORMAT_VERSION, 0, -1))
    assert "*Format*" not in text.partition("## Unreleased")[2]
    assert PAGE.startswith(f"# The saved format, version {FORMAT_VERSION}\n")


@pytest.mark.parametrize("spec", ["3", "k4v2", "k8v5,page=64,seed=7", "3,center=off"])
def test_its_reader_reads_a_file(spec, reader, books, tmp_path):
    model, _ = books
    cache = tq.make_prompt_cache(model, spec)
    ids = np.random.default_rng(0).integers(0, 1000, (1, 600))
    mx.eval(model(mx.array(ids), cache=cache))
    path = tmp_path / "cache.safetensors"
    tq.save_prompt_cache(path, cache)
    spec = tq.CacheSpec.parse(spec)
    for layer in (0, 7):
        for side, held in zip(
            ("keys", "values"), cache[layer].compressed(), strict=True
        ):
            bits = int(getattr(spec, side).bits)
            header, got = reader["read"](
                path, layer, side, bits, coefficients(128, bits), spec.page, spec.seed
            )
            assert header.split()[2] == spec.full
            want = np.array(stored(held))[:, :, spec.sink : spec.sink + got.shape[2]]
            assert got.shape == (1, 2, (600 - 36) // 32 * 32, 128)
            assert np.abs(got - want).max() < 3e-6 * np.abs(want).max()


def test_its_example_runs(reader):
    (session,) = re.findall(r"^```pycon\n(.*?)^```", PAGE, re.M | re.S)
    test = doctest.DocTestParser().get_doctest(session, dict(reader), "format", None, 0)
    assert len(test.examples) > 6
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said
    codec = tq.codec_for(tq.CodecSpec("turboquant", 3), 32, "keys")
    x = mx.arange(32, dtype=mx.float32)[None, None, None]
    codes = codec.encode(codec.rotation.forward(x))
    for word in codes.view("words").reshape(-1).tolist():
        assert f"0x{word:08X}" in session
    assert str(codes.view("scales").item()) in session


def test_its_coefficients_are_the_packages():
    rows = re.findall(r"^\| (\d+) \| (\d) \| ([-\d., e]+) \|$", PAGE, re.M)
    assert len(rows) == 24
    for dim, bits, terms in rows:
        said = tuple(float(term) for term in terms.split(", "))
        assert said == coefficients(int(dim), int(bits))

"""Texts of our kernels for Apple's compiler: which there are, what compiles them."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from metaltext import apple
from metaltext.specialisations import HEAD_DIMS, specialisations
from metaltext.texts import entry_text, file_name, full_text, prelude, write

from mlx_turboquant.codecs import codec_names
from mlx_turboquant.codecs.registry import codec_info
from mlx_turboquant.kernels import attention, codes, probe
from mlx_turboquant.kernels.kernel import Kernel

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def made():
    return specialisations()


def of(made, name):
    return [dict(one.template) for one in made if one.kernel.name == name]


def test_every_kernel_codec_head_dim_dtype_and_number_of_rows_is_there(made):
    kernels = {
        kernel.name
        for module in (attention, codes, probe)
        for kernel in vars(module).values()
        if isinstance(kernel, Kernel)
    }
    assert {one.kernel.name for one in made} == kernels
    splits = of(made, "decode_split_kv")
    assert {t["DK"] for t in splits} == {t["DV"] for t in splits} == set(HEAD_DIMS)
    assert {str(t["T"]) for t in splits} == {
        str(dtype) for dtype in (mx.float16, mx.bfloat16, mx.float32)
    }
    assert {t["FMA_ROWS"] for t in splits} == {0, 1, 2, 3, 4}
    assert {t["MASKED"] for t in splits} == {t["CENTER"] for t in splits} == {0, 1}
    assert {t["ROW_TILES"] for t in splits} == {1, 2}
    widths = {w for name in codec_names() for w in codec_info(name).widths}
    assert {(t["KIND"], t["BITS"]) for t in of(made, "order_codes")} >= {
        *((0, int(w)) for w in widths if w == int(w)),  # scalar
        *((2, int(2 * w)) for w in codec_info("trellis").widths),
    }


def test_no_input_is_a_constant(made):
    """Our functions take ``device`` pointers; MLX passes under 8 elements otherwise."""
    for one in made:
        entry = entry_text(one)[1]
        constants = re.findall(r"constant \w+[*&] (\w+)", entry.split(") {")[0])
        assert all(name.endswith("_strides") for name in constants), one.name
        assert len(re.findall(r"\[\[buffer\(\d+\)\]\]", entry)) <= 31


def test_a_text_is_mlx_prelude_header_and_entry(made):
    one = made[0]
    text, (header, entry) = full_text(one), entry_text(one)
    places = [text.index(part) for part in (prelude(), header, entry)]
    assert places == sorted(places)
    assert '#include "' not in text
    assert "typedef half float16_t;" in prelude()
    for name in (*one.kernel.inputs, *one.kernel.outputs):
        assert re.search(rf"\b{name} \[\[buffer", entry), name
    assert entry.count("[[kernel]]") == 2
    assert "[[host_name(" in entry


#: Characters of a kernel's text that MLX reads at every launch: L10 of docs/metal.md.
LENGTHS = {
    "decode_split_kv": 56_000,
    "merge_states": 9_500,
    "encode_scalar": 14_000,
    "encode_trellis": 19_000,
    "order_codes": 17_500,
    "materialize": 22_500,
    "rotate": 7_000,
    "page_means": 7_500,
    "channel_gains": 8_000,
    "probe": 9_000,
}


def test_texts_stay_short(made):
    longest = dict.fromkeys(LENGTHS, 0)
    for one in made:
        length = len(one.kernel.header("metal") + one.kernel.body("metal"))
        longest[one.kernel.name] = max(longest[one.kernel.name], length)
    for name, limit in LENGTHS.items():
        assert limit * 0.9 < longest[name] <= limit, (name, longest[name])


def test_texts_are_written_once_each_and_the_same_again(made, tmp_path):
    index = write(made[::5], tmp_path)
    assert len(index) == len({file_name(one) for one in made[::5]}) > 80
    assert {*index, tmp_path / "index.txt"} == set(tmp_path.iterdir())
    before = {path: path.read_text() for path in index}
    assert len(set(before.values())) == len(before)
    assert write(specialisations()[::5], tmp_path) == index
    assert {path: path.read_text() for path in index} == before


#: Knows two versions of the language, warns, and refuses what holds `refuses`.
FAKE = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
assert arguments[:3] == ["-sdk", "macosx", "metal"], arguments
if "--version" in arguments:
    sys.exit(0)
(std,) = (a for a in arguments if a.startswith("-std="))
if std not in {known}:
    sys.exit(f"error: invalid value '{{std[5:]}}' in '-std={{std[5:]}}'")
assert "-Wall" in arguments and "-fno-fast-math" in arguments
out = pathlib.Path(arguments[arguments.index("-o") + 1])
text = "" if arguments[-1] == "-" else pathlib.Path(arguments[-1]).read_text()
print("tq.header:3:1: warning: too plain [-Wplain]", file=sys.stderr)
if {refuses!r} in text:
    sys.exit("tq.entry:1:1: error: no such thing")
out.write_text("air")
"""


@pytest.fixture
def xcrun(tmp_path, monkeypatch):
    """Puts a `xcrun` on the path that knows some versions and refuses some text."""

    def install(known=("metal3.1", "metal3.2"), refuses="nothing has this"):
        path = tmp_path / "bin" / "xcrun"
        path.parent.mkdir(exist_ok=True)
        stds = [f"-std={version}" for version in known]
        path.write_text(FAKE.format(python=sys.executable, known=stds, refuses=refuses))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent), prepend=":")

    return install


def run(folder, *options):
    command = [sys.executable, "-m", "metaltext", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS)
    return done.returncode, done.stdout, done.stderr


def test_the_command_compiles_every_text_for_every_version(xcrun, tmp_path):
    xcrun()
    code, out, err = run(tmp_path / "texts", "--compile", "--first", "5")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.match(r"5 texts in .*; index.txt says what each is", lines[0])
    assert lines[1] == "metal3.1: 5 of 5 texts compiled; warnings: 5 [-Wplain]"
    assert lines[2] == "metal3.2: 5 of 5 texts compiled; warnings: 5 [-Wplain]"
    assert lines[3].startswith(
        "metal4.0: NOT COMPILED, this toolchain says: error: inv"
    )
    assert len(list((tmp_path / "texts").glob("*.metal3.1.air"))) == 5


def test_a_refused_text_is_named_and_fails_the_command(xcrun, tmp_path):
    xcrun(apple.VERSIONS, refuses="TQ_FUNC void simd_hadamard")
    code, out, _ = run(tmp_path / "texts", "--compile", "--first", "5")
    assert code == 1
    for version in apple.VERSIONS:
        passed = int(re.search(rf"{version}: (\d) of 5 texts", out)[1])
        assert passed < 5
        assert (
            len(re.findall(rf"^{version}: \w+-\w+\.metal: ", out, re.M)) == 5 - passed
        )
    assert "tq.entry:1:1: error: no such thing" in out


def test_a_toolchain_of_none_of_the_versions_is_an_error(xcrun, tmp_path):
    xcrun(known=())
    code, _, err = run(tmp_path / "texts", "--compile", "--first", "1")
    assert code == 1
    assert "knows none of metal3.1, metal3.2, metal4.0" in err


def test_no_compiler_is_an_error_that_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install Xcode"):
        apple.compile_all([tmp_path / "a.metal"], 1)


def test_the_workflow_compiles_the_texts_before_it_runs_anything():
    path = TESTS.parent / ".github/workflows/macos.yml"
    jobs = yaml.safe_load(path.read_text())["jobs"]
    texts = [step["run"] for step in jobs["texts"]["steps"] if "run" in step]
    assert any("-m metaltext" in run and "--compile" in run for run in texts)
    assert jobs["metal"]["needs"] == "texts"

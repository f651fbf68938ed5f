"""The command as users run it: real processes, real exit codes."""

import importlib
import inspect
import re
import subprocess
import sys
import tomllib

import pytest
from helpers import MODEL, ROOT

import mlx_turboquant as tq
from mlx_turboquant.cli import app, options
from mlx_turboquant.cli.progress import prefill_progress

MODEL = str(MODEL)
NEEDLE = (ROOT / "examples" / "needle.txt").read_text()


def test_generates_with_three_bits_from_stdin(run_cli):
    code, out, err = run_cli(
        "generate", "--model", MODEL, "--kv-bits", "3", "-p", "-", "-m", "8",
        stdin=NEEDLE,
    )  # fmt: skip
    assert code == 0, err
    assert "48213" in out
    assert re.search(r"Prompt: 1\d{3} tokens, [\d.]+ tokens-per-sec", out)
    assert re.search(r"Generation: \d+ tokens, [\d.]+ tokens-per-sec", out)
    assert re.search(r"Peak memory: [\d.]+ GB", out)
    assert re.search(
        r"KV cache: .* in fp16 \([\d.]+x smaller\), .* k3v3 in 8 of 8", out
    )
    assert "float32" in err


def test_quiet_prints_the_answer_and_nothing_else(run_cli):
    args = ("generate", "--model", MODEL, "-p", "Once upon a", "-m", "12")
    quiet = run_cli(*args, "--verbose", "F", "--kv-bits", "8")
    plain = run_cli(*args, "--verbose", "False")
    assert quiet == plain
    assert quiet[0] == 0
    assert len(quiet[1].split()) > 5
    assert "==" not in quiet[1]


def test_options_reach_the_spec(run_cli):
    code, out, err = run_cli(
        "generate", "--model", MODEL, "-p", "Hello", "-m", "4",
        "--kv-bits", "3.5,window=16,sink=2,center=off,seed=5", "--kv-codec", "trellis",
        "--temp", "0.7", "--top-p", "0.9", "--seed", "1",
    )  # fmt: skip
    assert code == 0, err
    assert "k3.5v3.5,codec=trellis,sink=2,window=16,center=off,seed=5 in 8 of 8" in out


@pytest.mark.parametrize("command", ["plan", "doctor", "generate"])
def test_an_mlx_without_its_library_is_said_in_a_line(command, tmp_path):
    """As on Linux without an extra."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    said = "libmlx.so: cannot open shared object file"
    (tmp_path / "mlx" / "core.py").write_text(
        f"raise ImportError({said!r}, name='core', path=__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mlx_turboquant", command],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        input="",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: MLX cannot be loaded ({said})")
    assert ("pip install 'mlx-tq[cpu]'" in line) == (sys.platform == "linux")


def test_without_kv_bits_it_is_mlx_lm(run_cli):
    code, out, _ = run_cli("generate", "--model", MODEL, "-p", "Hello", "-m", "4")
    assert code == 0
    assert "uncompressed" in out


def test_resumes_a_saved_cache(run_cli, books, tmp_path, hooked):
    import mlx.core as mx

    model, tokenizer = books
    text, question = NEEDLE.split("\n\nQuestion")
    cache = tq.make_prompt_cache(model, 4)
    model(mx.array([tokenizer.encode(text)]), cache=cache)
    file = tmp_path / "book.safetensors"
    tq.save_prompt_cache(file, cache, {"model": MODEL, "tokenizer_config": "{}"})
    code, out, err = run_cli(
        "generate", "--prompt-cache-file", str(file), "-m", "8",
        "-p", "\n\nQuestion" + question,
    )  # fmt: skip
    assert code == 0, err
    assert "48213" in out
    assert "k4v4 in 8 of 8" in out


BAD = {
    "model": (["--model", "no/such-model"], "cannot load model 'no/such-model'"),
    "folder": (["--model", str(ROOT / "docs")], "cannot load model"),
    "bits": (["--kv-bits", "9"], "9 bits per element is outside 1..8"),
    "words": (["--kv-bits", "many"], "cannot read bits from 'many'"),
    "codec": (["--kv-bits", "3", "--kv-codec", "zip"], "codec 'zip' is unknown"),
    "window": (["--kv-bits", "3,window=-5"], "window -5 is outside"),
    "alone": (["--kv-codec", "trellis"], "--kv-codec needs --kv-bits"),
    "both": (
        ["--kv-bits", "3", "--max-kv-size", "64"],
        "its window of 64 tokens is too short for 292",
    ),
    "empty": (["-p", ""], "the prompt is empty"),
    "template": (["--chat-template-config", "{"], "is not JSON"),
    "cache": (["--prompt-cache-file", "/nowhere.safetensors"], "cannot read a prompt"),
    "long": (["-p", "word " * 9000], "the model's context is 8192"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run_cli, case):
    args, says = BAD[case]
    model = () if "--model" in args else ("--model", MODEL)
    code, out, err = run_cli("generate", *model, *args)
    lines = [x for x in err.splitlines() if x.startswith("error: ")]
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in err


def test_bits_by_layer_on_the_command_line(run_cli):
    options = ["--kv-bits", "auto", "--kv-quality", "small", "-m", "8", "--temp", "0"]
    code, out, err = run_cli(
        "generate", "--model", MODEL, *options, "-p", "-", stdin=NEEDLE
    )
    assert code == 0, err
    assert "48213" in out
    assert re.search(r"k\dv\d x\d+ .*in 8 of 8 layers", out)
    code, _, err = run_cli(
        "generate", "--model", MODEL, "--kv-quality", "small", "-p", "x"
    )
    assert (code, err) == (2, "error: --kv-quality needs --kv-bits auto\n")


def test_help_names_our_options(run_cli):
    code, out, _ = run_cli("generate", "--help", env={"COLUMNS": "120", "PATH": ""})
    assert code == 0
    assert set(re.findall(r"--kv-\w+", out)) == {
        "--kv-bits",
        "--kv-codec",
        "--kv-quality",
    }
    assert "3,sink=8,seed=1" in out


def test_help_loads_no_mlx():
    code = (
        "import sys, mlx_turboquant.cli.app as app\n"
        "try: app.main(['generate', '--help'])\n"
        "finally: print(*(m for m in ('mlx', 'numpy', 'mlx_lm') if m in sys.modules))"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True).splitlines()[-1] == ""


def test_help_names_the_codecs_that_are_no_research():
    registry = pytest.importorskip("mlx_turboquant.codecs.registry")
    assert set(options.KV_CODECS) == set(registry.codec_names())


def test_console_scripts_are_commands(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    scripts = project["scripts"]
    assert scripts.keys() == {"mlx_tq", *(f"mlx_tq.{name}" for name in app.COMMANDS)}
    for name, target in scripts.items():
        module, _, attribute = target.partition(":")
        program = getattr(importlib.import_module(module), attribute)
        with pytest.raises(SystemExit) as end:
            program(["--help"], prog_name=name)
        assert end.value.code == 0
        assert f"Usage: {name} " in capsys.readouterr().out


def test_commands_share_their_options_and_nothing_else():
    for name in ("generate", "chat", "cache_prompt", "server"):
        options_of = inspect.signature(app.COMMANDS[name]).parameters
        first = list(options_of).index("kv_bits")
        shared = list(options_of)[first : first + 3]
        assert shared == ["kv_bits", "kv_codec", "kv_quality"]
    modules = {command.__module__ for command in app.COMMANDS.values()}
    names = "|".join(module.rpartition(".")[2] for module in modules)
    for module in modules:
        text = inspect.getsource(importlib.import_module(module))
        assert not re.search(rf"^ *from \.({names}) import", text, re.M), module


def test_progress_shows_at_terminals_only(capsys):
    with prefill_progress(5000) as report:
        report(0, 5000)
        report(5000, 5000)
    assert capsys.readouterr() == ("", "")
    with prefill_progress(100) as report:
        assert report is None


def test_version(run_cli):
    assert run_cli("--version") == (0, f"mlx-tq {tq.__version__}\n", "")

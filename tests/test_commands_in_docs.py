"""What README and docs tell people to type: README's commands run, all others parse."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import typer
from helpers import MODEL, ROOT

import mlx_turboquant as tq
from mlx_turboquant.cli import app

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
HUB = re.compile(r"mlx-community/[\w.-]+")
#: Messages in docs/troubleshooting.md that are Python's, MLX's or the system's.
FOREIGN = {
    "No module named 'mlx_tq'",
    "module 'mlx_turboquant' has no attribute 'apply'",
    "pip show mlx-turboquant",
    "libmlx.so: cannot open shared object file",
    "KeyError: 'TurboQuantCache'",
    "Address already in use",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """Words of every command in a page's shell blocks and code spans."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    spans = re.findall(r"`((?:pip install|mlx_tq[. ]|make |uvx )[^`]+)`", prose)
    for line in lines + [part for span in spans for part in span.split(" && ")]:
        words = shlex.split(line, comments=True)
        if "--" in words:  # of mlx.launch
            words = words[words.index("--") + 1 :]
        if words:
            yield words[: words.index("<")] if "<" in words else words


def parse(words):
    """Let a command of ours read its options, and not run."""
    name, *args = words
    group = typer.main.get_command(app.main)
    if name == "mlx_tq":
        name, *args = args
    command = group.commands[name.removeprefix("mlx_tq.")]
    args = [arg for arg in args if arg != "--help"]
    needed = {"cache_prompt": ["--prompt-cache-file", "x", "-p", "x"]}
    command.make_context(name, [*args, *needed.get(command.name, [])])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_their_options_exist(page):
    for words in commands(page):
        if words[0].startswith("mlx_tq") and not {"NAME", "mlx_tq.NAME"} & {*words}:
            if words[1:] not in (["--version"], []):
                parse(words)
        elif words[0] == "make":
            targets = re.search(
                r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M
            )
            assert words[1] in targets[1].split(), words
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= EXTRAS.keys() or "mlx[" in words[-1]


def test_an_option_that_does_not_exist_is_seen():
    with pytest.raises(Exception, match="No such option: --kv-bit"):
        parse(["mlx_tq.chat", "--kv-bit", "3"])


def test_the_readmes_commands_run(tmp_path):
    """With the bundled model in the place of others, and short answers."""
    ran = []
    for words in commands(README):
        name = words[0].removeprefix("mlx_tq.")
        if name not in ("chat", "generate", "plan", "server") or len(words) < 3:
            continue
        if "M" in words:
            words[words.index("M")] = str(MODEL)
        args = [HUB.sub(str(MODEL), word) for word in words[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "mlx_turboquant", name, *args],
            input="/quit\n",
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        ran.append(name)
    assert ran == ["chat", "plan"]


def test_the_readmes_python_prints_what_it_says(monkeypatch):
    """What stands in comments behind ``print``, on its line or the next."""
    (code,) = blocks(README, "python")
    said = re.findall(r"^print.*?#(.*?)$", code, re.M | re.S)
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(code, "README.md", "exec"), {})
    assert len(said) == 2
    assert shown.getvalue().split() == " ".join(said).split()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_in_docs_uses_names_that_exist(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tq":
                assert hasattr(tq, node.attr), f"tq.{node.attr}"
    for name in re.findall(r"`tq\.(\w+)", page.read_text()):
        assert hasattr(tq, name), f"tq.{name}"


def test_troubleshooting_quotes_messages_that_exist():
    sources = [*(ROOT / "mlx_turboquant").rglob("*.py"), ROOT / "Makefile"]
    texts = "".join(path.read_text() for path in sources)
    quoted = 0
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        for message in re.findall(r"`([^`]+)`", line[1:].split(" | ")[0]):
            if line.startswith("| ") and message not in FOREIGN:
                assert message in texts, message
                quoted += 1
    assert quoted > 20

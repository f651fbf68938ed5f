"""Every example runs as a reader would run it, and the notebook shows what it did."""

import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from urllib.request import urlopen

import nbformat
import pytest
from helpers import MODEL, ROOT
from nbclient import NotebookClient

EXAMPLES = ROOT / "examples"


def run(script, *args, cwd):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *args],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


#: What each shows; openai_client.py has a test of its own.
SHOWS = {
    "generate_text.py": ("48213", "k3v3 in 8 of 8 layers", "4+1536+"),
    "save_and_resume.py": ("48213", "tokens saved in"),
    "long_document.py": ("tokens read: ", "in 8 of 8 layers", "lantern?48213"),
    "evaluate_your_text.py": ("auto,quality=balanced", "k2v2", "affine:4"),
    "plan_memory.py": ("context 8192", "uncompressed", "k3v3"),
    "compare_codecs.py": ("3.125", "8.125"),
    "search.py": ("256 passages of 16 tokens", "fp16", "turboquant 3 bits"),
    "add_a_codec.py": ("48213", "k3v3,codec=uniform in 8 of 8 layers"),
}


@pytest.mark.parametrize(("script", "shows"), SHOWS.items())
def test_script(script, shows, tmp_path):
    shown = run(script, cwd=tmp_path)
    for text in shows:
        assert text in shown


@contextmanager
def serving(*options):
    """A server in a process of its own, by its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlx_turboquant", "server", "--port", port]
    process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with suppress(OSError), urlopen(f"{url}/health", timeout=5):
                break
            assert process.poll() is None
            time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_openais_client(tmp_path):
    pytest.importorskip("openai", reason="OpenAI's client is not installed")
    with serving("--model", str(MODEL), "--kv-bits", "4") as url:
        shown = run("openai_client.py", f"{url}/v1", cwd=tmp_path)
    answers = shown.strip().split("\n\n")
    assert len(answers) >= 2
    assert len(shown.split()) > 20


def test_every_example_is_run_and_listed():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == SHOWS.keys() | {"openai_client.py"}
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert all(f"(../examples/{name})" in page for name in [*scripts, "tour.ipynb"])


def test_no_example_begins_with_ceremony():
    """This package is imported before MLX, which is all that it takes."""
    for path in [*EXAMPLES.glob("*.py"), EXAMPLES / "tour.ipynb"]:
        text = path.read_text()
        assert "BLAS" not in text, path.name
        assert "isort" not in text, path.name
        ours = text.find("import mlx_turboquant")
        theirs = text.find("import mlx.core")
        assert path.name == "openai_client.py" or ours > 0, path.name
        assert theirs < 0 or ours < theirs, path.name


def texts(notebook):
    """What its cells printed or returned, numbers aside: those are a machine's."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            if output.get("name") != "stderr":  # warnings of this machine
                said = output.get("text") or output.data["text/plain"]
                yield re.sub(r"[\d.]+(e-\d+)?", "#", said)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook runner
def test_notebook():
    saved = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = str([cell.outputs for cell in code])
    for text in ("48213", "k3v3 in 8 of 8 layers", "TurboQuantCache(k3v3", "3.125"):
        assert text in shown
    assert shown.count("image/png") == 3
    again = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    NotebookClient(
        again, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    assert list(texts(again)) == list(texts(saved))

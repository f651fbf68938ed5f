"""Every example runs as a reader would run it."""

import subprocess
import sys

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("script", "shows"),
    [
        ("generate_text.py", ("48213", "k3v3 in 8 of 8 layers", "4+1536+")),
        ("save_and_resume.py", ("48213", "tokens saved in")),
        ("compare_codecs.py", ("3.125", "8.125")),
        ("add_a_codec.py", ("48213", "k3v3,codec=uniform in 8 of 8 layers")),
    ],
)
def test_script(script, shows, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for text in shows:
        assert text in done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the notebook runner
def test_notebook(monkeypatch):
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    shown = str([cell.get("outputs") for cell in notebook.cells])
    for text in ("48213", "k3v3 in 8 of 8 layers", "TurboQuantCache(k3v3", "3.125"):
        assert text in shown

"""Files of the other package that has our folder are noticed before they run."""

import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

from mlx_turboquant.namesake import refuse_namesake

PACKAGE = ROOT / "mlx_turboquant"
SENTENCE = r"mlx-turboquant 0\.0\.2 \(somebody.*pip uninstall -y mlx-turboquant && "


def metadata(site, name, *files):
    """What an installer leaves in ``site`` of a distribution that has ``files``."""
    folder = site / f"{name}.dist-info"
    folder.mkdir(parents=True)
    (folder / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))
    return folder


def test_files_of_the_other_package_are_an_error(tmp_path):
    ours = str(tmp_path / "mlx_turboquant")
    metadata(tmp_path, "mlx_tq-0.1.0", "mlx_turboquant/__init__.py")
    metadata(tmp_path, "mlx_turboquant_extras-1.0", "mlx_turboquant/extras.py")
    refuse_namesake(ours)
    refuse_namesake(str(tmp_path / "no_such_folder" / "mlx_turboquant"))
    theirs = metadata(tmp_path, "mlx_turboquant-0.0.2", "mlx_turboquant/cli.py")
    with pytest.raises(ImportError, match=SENTENCE):
        refuse_namesake(ours)
    (theirs / "RECORD").unlink()
    with pytest.raises(ImportError, match=SENTENCE):
        refuse_namesake(ours)


def test_a_checkout_under_the_former_name_is_none(tmp_path):
    """Its metadata lies beside a package of which it has no file."""
    metadata(tmp_path, "mlx_turboquant-0.1.0", "_editable_impl_mlx_turboquant.pth")
    refuse_namesake(str(tmp_path / "mlx_turboquant"))


def mixed(tmp_path, last):
    """A folder with files of both."""
    shutil.copytree(PACKAGE, tmp_path / "mlx_turboquant")
    metadata(tmp_path, "mlx_turboquant-0.0.2", "mlx_turboquant/__init__.py")
    if last == "theirs":
        (tmp_path / "mlx_turboquant" / "__init__.py").write_text("")
    return f"two distributions share the folder {tmp_path / 'mlx_turboquant'}"


def run(tmp_path, *words):
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )


@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_whichever_was_installed_last_it_is_said(tmp_path, last):
    """Their ``__init__`` knows nothing of it, so our commands look as well."""
    sentence = mixed(tmp_path, last)
    done = run(tmp_path, "-c", "import mlx_turboquant.cli.plan")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {sentence}")


@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_commands_say_it_in_a_line(tmp_path, last):
    """As all their errors: no traceback, code 2."""
    sentence = mixed(tmp_path, last)
    script = tmp_path / "mlx_tq.plan"
    script.write_text("from mlx_turboquant.cli.plan import main; main()")
    for words in ([script], ["-m", "mlx_turboquant", "plan"]):
        done = run(tmp_path, *words)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {sentence}")


def test_looking_costs_an_import_nothing():
    """No module is loaded for it: ``importlib.metadata`` alone takes 10 ms."""
    code = (
        "import sys, __future__; before = set(sys.modules); "
        "sys.path.insert(0, sys.argv[1]); import namesake; "
        "print(*sorted(set(sys.modules) - before))"
    )
    words = [sys.executable, "-c", code, str(PACKAGE)]
    assert subprocess.check_output(words, text=True) == "namesake\n"

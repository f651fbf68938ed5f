"""What surrounds a check neither ends a program nor is blamed on kernels."""

import errno
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_proof import KEY, SUBJECT, job

from mlx_turboquant.proof import place, runner
from mlx_turboquant.proof.ledger import Ledger
from mlx_turboquant.proof.runner import CannotRunError
from mlx_turboquant.proof.store import Store, Verdict

OK = Verdict("ok", str(SUBJECT), checks=33, seconds=1.0)


def found_right(monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *args: OK)


@pytest.mark.parametrize("executable", ["", None, "frozen"])
def test_an_app_starts_no_copy_of_itself(executable, monkeypatch, counted):
    if executable == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(CannotRunError, match="no Python of its own"):
        runner.run(job("right"), None)
    assert not counted


class StartedError(Exception):
    pass


def environment_of_child(monkeypatch):
    seen = {}

    def popen(command, **options):
        seen.update(options["env"])
        raise StartedError

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(StartedError):
        runner.run(job("right"), None)
    return seen


def test_a_child_proves_nothing_by_itself(monkeypatch):
    monkeypatch.setenv("MLX_TQ_BACKEND", "gpu")
    assert environment_of_child(monkeypatch)["MLX_TQ_BACKEND"] == "reference"


def test_the_current_folder_hides_no_module_from_a_child(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    here = str(Path(__file__).parent)
    monkeypatch.setattr(sys, "path", ["", Path(here), *sys.path])
    verdict = runner.run(job("segfaults"), None)
    assert verdict.status == "crash"  # it came to the first check


def test_a_package_that_only_the_current_folder_has_is_found(monkeypatch):
    root = str(Path(runner.__file__).parents[2])
    elsewhere = [p for p in sys.path if os.path.abspath(p) != root]
    monkeypatch.setattr(sys, "path", ["", *elsewhere])
    assert environment_of_child(monkeypatch)["PYTHONPATH"].split(os.pathsep)[-1] == root


def test_an_error_of_ours_is_said_and_not_waited_for(verdicts, monkeypatch):
    def run(*args):
        raise RuntimeError("nobody thought of it")

    monkeypatch.setattr(runner, "run", run)
    ledger = Ledger(verdicts)
    ledger.start(KEY, job("right"))
    ledger.wait()
    with pytest.warns(UserWarning, match="RuntimeError: nobody thought of it"):
        assert ledger.standing(KEY).status == "unknown"
    assert verdicts.read(KEY.digest) is None


def test_a_pipe_with_a_high_number_is_read():
    """``select`` takes numbers below 1,024 only."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, limits[1]))
    try:
        read, write = os.pipe()
        high = os.dup2(read, 1500)
        os.write(write, b"a line\n")
        os.close(write)
        with open(high, "rb") as pipe:
            assert list(runner._lines(pipe, 5)) == [b"a line"]
        os.close(read)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_disk_that_fills_up_costs_no_verdict(verdicts, monkeypatch):
    found_right(monkeypatch)
    written = verdicts.write

    def write(digest, verdict):
        if verdict.status == "ok":
            raise OSError(errno.ENOSPC, "No space left on device")
        written(digest, verdict)

    monkeypatch.setattr(verdicts, "write", write)
    runs = []
    monkeypatch.setattr(runner, "run", lambda *args: runs.append(1) or OK)
    ledger = Ledger(verdicts)
    ledger.start(KEY, job("right"))
    assert ledger.wait() == [OK]
    assert len(runs) == 1
    assert verdicts.read(KEY.digest) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_log_that_cannot_be_written_costs_no_verdict():
    verdict = runner.run(job("segfaults"), Path("/dev/full"))
    assert verdict.status == "crash"


@pytest.fixture
def spare(tmp_path, monkeypatch):
    """The folder of this user in a folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"mlx_turboquant-{os.getuid()}"


def test_where_verdicts_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert place.cache_folder() == tmp_path / "x" / "mlx_turboquant" / "proofs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, base in (("darwin", "Library/Caches"), ("linux", ".cache")):
        monkeypatch.setattr(sys, "platform", platform)
        assert place.cache_folder() == tmp_path / base / "mlx_turboquant" / "proofs"


def test_paths_that_are_not_absolute_are_no_homes(spare, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    home = tmp_path / ".cache" / "mlx_turboquant" / "proofs"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert place.cache_folder() == home
    for empty in ("", "relative", "/"):
        monkeypatch.setenv("HOME", empty)
        assert place.cache_folder() == spare


def no_home(tmp_path, monkeypatch):
    """A file where the folder should be: nobody can write there, not even root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def test_a_home_that_cannot_be_written_to_has_a_spare(spare, tmp_path, monkeypatch):
    no_home(tmp_path, monkeypatch)
    found_right(monkeypatch)
    ledger = Ledger(Store())
    assert not spare.exists()  # a start alone leaves nothing
    ledger.start(KEY, job("right"))
    ledger.wait()
    assert spare.stat().st_mode & 0o777 == 0o700
    assert Ledger(Store()).standing(KEY) == OK


def test_a_spare_of_someone_else_is_not_believed(spare, tmp_path, monkeypatch):
    no_home(tmp_path, monkeypatch)
    home = tmp_path / "file" / "mlx_turboquant" / "proofs"
    spare.mkdir(mode=0o777)
    spare.chmod(0o777)
    assert place.cache_folder() == home
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")
    assert Store().verdicts() == []
    with pytest.raises(NotADirectoryError), Store().lock():
        pass
    no_home(tmp_path, monkeypatch)
    spare.rmdir()
    (tmp_path / "mine").mkdir(mode=0o700)
    spare.symlink_to(tmp_path / "mine")
    assert place.cache_folder() == home

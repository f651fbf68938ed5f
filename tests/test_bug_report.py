"""Reports hold what a developer needs, and nobody's name."""

import getpass
import json
import platform

import mlx.core as mx
import pytest

from mlx_turboquant import bug_report
from mlx_turboquant.kernels.tuning import Heads
from mlx_turboquant.proof.store import Verdict
from mlx_turboquant.proof.tuned import Tuned


@pytest.fixture
def anna(tmp_path, monkeypatch):
    """A user with a home folder that is a link, on a machine with a name."""
    real = tmp_path / "disk" / "Anna.Smith"
    real.mkdir(parents=True)
    (tmp_path / "Anna").symlink_to(real)
    monkeypatch.setenv("HOME", str(tmp_path / "Anna"))
    monkeypatch.setattr(getpass, "getuser", lambda: "anna")
    monkeypatch.setattr(platform, "node", lambda: "annas-mac.local")
    return tmp_path / "Anna"


def test_a_report_has_verdicts_logs_and_machine(anna, tmp_path):
    log = anna / "cache" / "a.log"
    log.parent.mkdir()
    log.write_text(
        f"{anna}/venv/bin/python: error: no such identifier\n"
        f"{anna.resolve()}/x on annas-mac.local, by ANNA; /opt/anna/y; annabel\n"
    )
    log.with_name("b.log").write_text("checked")
    log.with_name("b.tuner.log").write_text(f"timed, by {anna}")
    verdicts = [
        Verdict("compile", "k3v3", f"in {anna}/cache", log=str(log), facts={"a": "b"}),
        Verdict(
            "ok",
            "k4v4",
            checks=34,
            seconds=3.2,
            errors={"attention": 1e-3},
            log=str(log.with_name("b.log")),
            tuned=(Tuned(Heads(8, 4), reason=f"left out: {anna}/x"),),
        ),
        Verdict("crash", "k2v2", log=str(anna / "no.log")),
    ]
    path = tmp_path / "report.json"
    path.write_text("an older one")
    bug_report.write(path, {"system": "macOS"}, verdicts, ["x: ok"], {"fp16": 1.5})
    text = path.read_text()
    report = json.loads(text)
    assert report["machine"] == {"system": "macOS"}
    assert set(report["mlx device"]) == set(mx.device_info())
    assert report["system build"]
    assert report["checks"] == ["x: ok"]
    assert report["milliseconds"] == {"fp16": 1.5}
    first, second, third = report["verdicts"]
    assert first["status"] == "compile"
    assert first["reason"] == "in ~/cache"
    assert first["facts"] == {"a": "b"}
    assert first["log text"] == (
        "~/venv/bin/python: error: no such identifier\n"
        "~/x on HOST, by USER; /opt/USER/y; annabel\n"
    )
    assert second["errors"] == {"attention": 1e-3}
    assert second["log text"] == "checked"
    assert second["tuner log text"] == "timed, by ~"
    assert "tuner log text" not in first
    assert second["tuned"][0]["heads"] == [8, 4]
    assert second["tuned"][0]["reason"] == "left out: ~/x"
    assert third["log text"].startswith("cannot be read: ")
    for name in ("Anna.Smith", "Anna", "annas-mac", str(tmp_path)):
        assert name not in text.replace("annabel", ""), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Anna", "disk", "report.json"]


def test_a_long_log_is_cut_and_a_missing_folder_is_an_error(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"begin" + b"x" * 200_000 + b"\xff end")
    path = tmp_path / "report.json"
    bug_report.write(path, {}, [Verdict("wrong", "k3v3", log=str(log))], [], {})
    (verdict,) = json.loads(path.read_text())["verdicts"]
    assert len(verdict["log text"]) == 100_000
    assert verdict["log text"].endswith("\ufffd end")
    with pytest.raises(OSError, match="no_folder"):
        bug_report.write(tmp_path / "no_folder" / "report.json", {}, [], [], {})

"""What happens beside a check: doctors, other processes, and those who watch it."""

import re
import time

import pytest
from proof_caches import backend_of, cache_of
from test_proof import KEY, SUBJECT, job
from typer.testing import CliRunner

from mlx_turboquant import diagnosis
from mlx_turboquant.backends import select
from mlx_turboquant.cli import progress
from mlx_turboquant.cli.app import main
from mlx_turboquant.integrations import proofs
from mlx_turboquant.kernels.tuning import Heads, Tuning
from mlx_turboquant.proof import runner
from mlx_turboquant.proof.ledger import Ledger
from mlx_turboquant.proof.runner import Job
from mlx_turboquant.proof.store import Store, Verdict
from mlx_turboquant.proof.tuned import Tuned

OK = Verdict("ok", str(SUBJECT), checks=33, seconds=1.0)


def doctor(*options):
    done = CliRunner().invoke(main, ["doctor", "--tokens", "600", *options])
    return done.exit_code, done.output


def test_doctor_runs_no_kernel_that_is_turned_off(a_mac, monkeypatch, counted):
    gpu, _ = a_mac("right")
    monkeypatch.setenv(select.VARIABLE, "reference")
    select.requested.cache_clear()
    monkeypatch.setattr(diagnosis, "CASES", diagnosis.CASES[:1])
    code, out = doctor()
    assert code == 0, out
    assert re.search("kernels +not run: MLX_TQ_BACKEND=reference", out)
    assert not gpu.used
    assert not counted


def test_what_is_wrong_is_said_before_it_is_written(a_proved_mac):
    _, ledger = a_proved_mac
    cache = cache_of()
    other = Store(ledger.store.folder)
    with other.lock():  # another process checks for a minute
        start = time.monotonic()
        with pytest.warns(UserWarning, match="the first step was off"):
            ledger.overturn(cache.choice.proof, "the first step was off")
        assert time.monotonic() - start < 1
    assert other.read(cache.choice.proof).status == "wrong"
    assert backend_of(cache).startswith("reference")


def test_a_tuner_does_not_bring_back_what_was_overturned(verdicts, monkeypatch):
    verdicts.write(KEY.digest, OK)
    ledger = Ledger(verdicts)
    found = Tuned(Heads(8, 4), Tuning(simdgroups=2))

    def run(job, *rest):
        with pytest.warns(UserWarning, match="off"):
            ledger.overturn(KEY.digest, "off")
        return Verdict("ok", "x", tuned=(found,))

    monkeypatch.setattr(runner, "run", run)
    asked = Job(SUBJECT, "metal", 8, heads=Heads(8, 4))
    assert ledger.tune(KEY, asked).status == "wrong"
    assert verdicts.read(KEY.digest).status == "wrong"


def test_doctor_forgets_nothing_under_a_check_of_another(a_proved_mac, monkeypatch):
    _, ledger = a_proved_mac
    monkeypatch.setattr(diagnosis, "CASES", ())
    with Store(ledger.store.folder).lock():
        code, out = doctor("--retry")
    assert code == 2
    assert "another process checks kernels" in out
    assert len(ledger.store.verdicts()) == 1
    assert "forgot 1 verdicts" in doctor("--retry")[1]


def test_a_check_says_how_far_it_is(a_mac, monkeypatch):
    _, ledger = a_mac("right")

    def run(job, log, patience, on_start, on_check):
        on_check(0, 34)
        time.sleep(0.5)
        on_check(12, 34)
        time.sleep(0.5)
        return OK

    monkeypatch.setattr(runner, "run", run)
    ledger.start(KEY, job("right"))
    said, shown = [], []
    proofs.wait(said.append, shown.append)
    assert len(said) == 2
    assert set(shown) == {f"{SUBJECT}: check {n} of 34" for n in (0, 12)}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_how_far_is_said_in_place(is_terminal, monkeypatch, capsys):
    def wait(say, show):
        say("Checking")
        show("kind: check 3 of 34")
        show("kind: check 4 of 34, and more")
        say("kind: ok")

    monkeypatch.setattr(proofs, "wait", wait)
    monkeypatch.setenv("COLUMNS", str(len("kind: check 3 of 34") + 1))
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    progress.wait_for_proofs()
    said = capsys.readouterr().err
    in_place = "".join(f"\r\x1b[Kkind: check {n} of 34" for n in (3, 4)) + "\r\x1b[K"
    assert said == f"Checking\n{in_place if is_terminal else ''}kind: ok\n"
    progress.wait_for_proofs(is_wanted=False)
    assert capsys.readouterr().err == ""

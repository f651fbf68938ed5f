"""Commands begin proofs, wait for them in a line, show what they found."""

import json
import os
import re

import mlx.core as mx
from helpers import MODEL
from proof_caches import backend_of

import mlx_turboquant as tq
from mlx_turboquant.proof.store import Verdict


def test_proofs_begin_with_the_caches_of_a_model(a_mac, books):
    from mlx_turboquant.integrations import proofs

    model, tokenizer = books
    _, ledger = a_mac("right")
    tq.make_prompt_cache(model, "k3v3")
    assert ledger.is_busy
    said = []
    proofs.wait(said.append)
    assert said[0].startswith("Checking the kernels")
    assert ": ok, 33 checks" in said[1]
    proofs.wait(said.append)
    assert len(said) == 2
    cache = tq.make_prompt_cache(model, "k3v3")
    model(mx.array([tokenizer.encode("It was ") * 100]), cache=cache)
    model(mx.array([[1]]), cache=cache)
    assert backend_of(cache).startswith("metal: proved")


def test_doctor_shows_verdicts_and_forgets_them(a_mac, monkeypatch, tmp_path, counted):
    from typer.testing import CliRunner

    from mlx_turboquant import diagnosis
    from mlx_turboquant.cli.app import main

    _, ledger = a_mac("right")
    monkeypatch.setattr(diagnosis, "CASES", diagnosis.CASES[:1])
    old = Verdict("crash", "an older one", "why", log="/the/log")
    ledger.store.write("0" * 24, old)

    def doctor(*options):
        done = CliRunner().invoke(main, ["doctor", "--tokens", "600", *options])
        return done.exit_code, done.output

    code, out = doctor()
    assert code == 0, out
    new = r"^kernels for turboquant:3 .*: ok \(2.*, 33 checks in .*, largest error"
    assert re.search(new, out, re.M)
    older = r"^kernels for an older one: crash \(.*\) why; log: /the/log"
    assert re.search(older, out, re.M)
    assert re.search(r"k3v3 on metal +\S+ ms", out)
    path = tmp_path / "report.json"
    code, out = doctor("--report", str(path))
    assert code == 0
    assert out.endswith(f"written: {path}\n")
    report = json.loads(path.read_text())
    assert [v["status"] for v in report["verdicts"]] == ["ok", "crash"]
    assert '"event": "end", "status": "ok"' in report["verdicts"][0]["log text"]
    assert {"fp16", "k3v3 on metal"} == set(report["milliseconds"])
    code, out = doctor("--retry", "--report", str(tmp_path / "none" / "x.json"))
    assert code == 2
    assert "is in no folder that exists" in out
    code, out = doctor("--retry", "--report", str(tmp_path))
    assert code == 2
    assert "is a folder; name a file in it" in out
    assert len(ledger.store.verdicts()) == 2
    code, out = doctor("--retry", "--report", os.devnull)
    assert code == 2
    assert re.search(r"--report cannot write .*no file", out)
    assert "forgot 2 verdicts" in out
    assert re.search(new, out, re.M)  # checked again
    assert "an older one" not in out
    assert len(counted) == 2


def test_eval_waits_for_proofs_before_its_first_job(a_mac, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from mlx_turboquant import evals
    from mlx_turboquant.cli.app import main

    _, ledger = a_mac("right")
    seen = []

    def evaluate(*args, **options):
        seen.append((ledger.is_busy, len(ledger.known)))
        raise tq.errors.SpecError("enough")

    monkeypatch.setattr(evals, "evaluate", evaluate)
    options = ["--model", str(MODEL), "--out", str(tmp_path), "--lengths", "300"]
    done = CliRunner().invoke(
        main, ["eval", "k3v2", "auto", "--needles", "0", *options]
    )
    assert "enough" in done.output
    assert seen == [(False, 1)]
    assert "Checking the kernels on this machine" in done.output
    assert ": ok, 33 checks" in done.output

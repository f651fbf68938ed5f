"""``mlx_tq.doctor``: does this machine run every kernel, rightly and how fast.

Owns the printing; the checks are `diagnosis`'s. Kernels that need proof are checked in
a process of their own, and what earlier ones found is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..blas import prefer_openblas
from ..errors import SpecError
from .entry import standalone
from .tables import print_table

if TYPE_CHECKING:
    from ..backends.gpu import Gpu
    from ..proof.ledger import Ledger
    from ..proof.store import Verdict
    from ..proof.tuned import Tuned


def doctor(
    tokens: Annotated[
        int, typer.Option(min=512, max=2**20, help="Tokens in the timed attention.")
    ] = 16384,
    retry: Annotated[
        bool,
        typer.Option("--retry", help="Forget what earlier checks of kernels found."),
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Find the fastest launches of attention, for later runs."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --tune: for the heads of this model (a folder or hub id, of "
            "which the config is read). Default: those of common models."
        ),
    ] = None,
    kv_bits: Annotated[
        str, typer.Option(help="With --tune: for caches of this --kv-bits.")
    ] = "3",
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a file for a bug report: all this and the logs, without names."
        ),
    ] = None,
) -> None:
    """Check this machine: versions, every kernel against the reference, one timing."""
    from .. import bug_report, diagnosis
    from ..backends import proved, select

    if model is not None and not tune:
        raise SpecError("--model needs --tune")
    if report is not None and not report.absolute().parent.is_dir():
        raise SpecError(f"--report {report} is in no folder that exists; make it first")
    if report is not None and report.is_dir():
        raise SpecError(f"--report {report} is a folder; name a file in it")
    if retry:
        _forget(proved.this_ledger())
    backend = select.gpu_backend()
    if tune and backend is None:
        raise SpecError("--tune needs a GPU, and MLX runs on the CPU here")
    facts = dict(diagnosis.machine())
    facts["OpenBLAS"] = "loaded" if prefer_openblas() else "not loaded"
    if backend is None:
        facts["kernels"] = "not run: MLX runs on the CPU here"
    is_off = select.requested() == "reference"
    if backend is not None and is_off:
        # Kernels may be turned off because they end the process that runs them.
        facts["kernels"] = f"not run: {select.VARIABLE}=reference"
    print_table(facts.items())
    failures, lines = 0, []
    if select.awaits_proof():
        failures = _prove()
    elif backend is not None and not is_off:
        # Line by line, not as a table: should a kernel end this process, the last
        # line says how far it came.
        for check in diagnosis.check_kernels(backend):
            verdict = "ok" if check.passed else "FAILED"
            error = f"error {check.error:.1e}"
            lines.append(f"{backend.name} {check.name}: {verdict}, {error}")
            typer.echo(lines[-1])
            if check.failure:
                lines.append(check.failure)
                typer.echo(check.failure, err=True)
            failures += not check.passed
    if tune and backend is not None:
        failures += _tune(backend, model, kv_bits)
    verdicts = proved.this_ledger().store.verdicts()
    for found in verdicts:
        typer.echo(_line(found))
        for tuned in found.tuned:
            typer.echo(_tuned_line(tuned))
    milliseconds = diagnosis.time_decode(tokens)
    print_table(
        (name, f"{time:.2f} ms", f"at {tokens} tokens")
        for name, time in milliseconds.items()
    )
    if report is not None:
        try:
            bug_report.write(report, facts, verdicts, lines, milliseconds)
        except OSError as error:
            raise SpecError(
                f"--report cannot write {report} ({error}); name another file"
            ) from error
        typer.echo(f"written: {report}")
    if failures:
        typer.echo(
            f"{failures} kernels failed; please report it: mlx_tq.doctor --report FILE "
            "writes what to send",
            err=True,
        )
        raise typer.Exit(1)


def _forget(ledger: Ledger) -> None:
    """Forget all verdicts.

    Raises:
        SpecError: if they cannot be deleted, or another process is about to write one.
    """
    from ..proof.store import BusyError

    try:
        typer.echo(f"forgot {ledger.forget()} verdicts")
    except OSError as error:
        raise SpecError(
            f"--retry cannot delete verdicts ({error}); delete {ledger.store.folder}"
        ) from error
    except BusyError as error:
        raise SpecError(
            f"--retry forgets nothing while {error}; wait until it is done, or end it"
        ) from error


def _prove() -> int:
    """Check kernels in a process of their own; returns how many are not to be used."""
    import warnings

    from .. import diagnosis
    from ..backends import proved
    from .progress import wait_for_proofs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdicts are printed
        diagnosis.begin_proofs()
    wait_for_proofs()
    return sum(not verdict.is_ok for verdict in proved.this_ledger().known)


def _tune(backend: Gpu, model: str | None, kv_bits: str) -> int:
    """Tune, and say for what; returns for how many kinds kernels are not right."""
    from ..integrations import tuning
    from ..spec import CacheSpec

    kinds = list(tuning.COMMON) if model is None else tuning.kinds_of(model)
    spec = CacheSpec.parse(kv_bits)
    typer.echo(f"tuning {spec}, a few seconds for each of {len(kinds)}...", err=True)
    failures = 0
    for kind, verdict in tuning.tune(backend, spec, kinds):
        if verdict is None or not verdict.is_ok:
            typer.echo(f"not tuned: {kind}", err=True)
            failures += 1
    return failures


def _tuned_line(tuned: Tuned) -> str:
    """What a tuner found, for what, and how long it took."""
    text = f"  tuned for {tuned.heads}: {tuned}"
    if tuned.tried:
        text += f"; {tuned.tried} tried in {tuned.seconds:.1f} s"
    return f"{text}; {tuned.reason}" if tuned.reason else text


def _line(verdict: Verdict) -> str:
    """A verdict, when it was made and how long it took."""
    text = f"kernels for {verdict.subject}: {verdict.status} ({verdict.history})"
    text += f" {verdict.reason}".rstrip()
    return text if verdict.is_ok or not verdict.log else f"{text}; log: {verdict.log}"


main = standalone(doctor)

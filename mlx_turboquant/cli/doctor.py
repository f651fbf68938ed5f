"""``mlx_tq.doctor``: does this machine run every kernel, rightly and how fast.

Owns the printing; the checks are `diagnosis`'s.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..blas import prefer_openblas
from .entry import standalone
from .tables import print_table


def doctor(
    tokens: Annotated[
        int, typer.Option(min=512, help="Tokens in the timed attention.")
    ] = 16384,
) -> None:
    """Check this machine: versions, every kernel against the reference, one timing."""
    from .. import diagnosis
    from ..backends import select

    backend = select.gpu_backend()
    facts = dict(diagnosis.machine())
    facts["OpenBLAS"] = "loaded" if prefer_openblas() else "not loaded"
    if backend is None:
        facts["kernels"] = "not run: MLX runs on the CPU here"
    print_table(facts.items())
    failures = 0
    if backend is not None:
        # Line by line, not as a table: should a kernel end this process, the last
        # line says how far it came.
        for check in diagnosis.check_kernels(backend):
            verdict = "ok" if check.passed else "FAILED"
            error = f"error {check.error:.1e}"
            typer.echo(f"{backend.name} {check.name}: {verdict}, {error}")
            if check.failure:
                typer.echo(check.failure, err=True)
            failures += not check.passed
    milliseconds = diagnosis.time_decode(tokens)
    print_table(
        (name, f"{time:.2f} ms", f"at {tokens} tokens")
        for name, time in milliseconds.items()
    )
    if failures:
        typer.echo(
            f"{failures} kernels failed; please report all of the above", err=True
        )
        raise typer.Exit(1)


main = standalone(doctor)

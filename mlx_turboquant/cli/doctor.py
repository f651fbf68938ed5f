"""``mlx_tq.doctor``: does this machine run every kernel, rightly and how fast.

Owns the printing; the checks are `diagnosis`'s.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .. import blas


def doctor(
    tokens: Annotated[
        int, typer.Option(min=512, help="Tokens in the timed attention.")
    ] = 16384,
) -> None:
    """Check this machine: versions, every kernel against the reference, one timing."""
    openblas = blas.prefer_openblas()

    from .. import diagnosis
    from ..backends import select

    for name, value in diagnosis.machine().items():
        typer.echo(f"{name:15s} {value}")
    typer.echo(f"{'OpenBLAS':15s} {'loaded' if openblas else 'not loaded'}")
    backend = select.gpu_backend()
    failed = 0
    if backend is None:
        typer.echo("kernels         not run: MLX runs on the CPU here")
    else:
        for check in diagnosis.check_kernels(backend):
            word = "ok" if check.passed else "FAILED"
            typer.echo(f"{backend.name} {check.name}: {word}, error {check.error:.1e}")
            if check.failure:
                typer.echo(check.failure, err=True)
            failed += not check.passed
    for name, milliseconds in diagnosis.time_decode(tokens).items():
        typer.echo(f"{name}: {milliseconds:.2f} ms at {tokens} tokens")
    if failed:
        typer.echo(f"{failed} kernels failed; please report all of the above", err=True)
        raise typer.Exit(1)

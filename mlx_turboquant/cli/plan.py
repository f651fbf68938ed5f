"""``mlx_tq.plan``: how many tokens fit in memory, and what each preset costs.

Owns the table, and the warning that other commands give before memory runs out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt

if TYPE_CHECKING:
    from ..memory import Footprint

#: Shown unless others are asked for.
_PRESETS = ("4", "k4v3", "3", "2", "3,codec=trellis", "2,codec=trellis")


def plan(
    specs: Annotated[
        list[str] | None, typer.Argument(help="Presets to compare, as for --kv-bits.")
    ] = None,
    model: opt.Model = None,
    memory: Annotated[
        str | None,
        typer.Option(help="As 16GB (1e9 bytes). Default: what MLX may use here."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Also say the bytes of so many tokens.")
    ] = None,
) -> None:
    """Say how long a context fits in memory, from a model's config alone."""
    parsed = [CacheSpec.parse(spec) for spec in specs or _PRESETS]
    for spec in parsed:
        if spec.adaptive:
            raise SpecError(
                f"the bits of {spec} are chosen from the text; plan with those it may "
                "choose, such as 3 or 2"
            )
    from rich.filesize import decimal

    from ..integrations.footprint import footprint
    from ..memory import machine_memory

    size = opt.size("--memory", memory) or machine_memory()

    found = footprint(model or opt.DEFAULT_MODEL)
    typer.echo(
        f"weights {decimal(found.weights)}, memory {decimal(size)}, context "
        f"{found.context or 'unknown'}{'' if found.context is None else ' tokens'}"
    )
    packed = sum(entry.is_compressed for entry in found.layers)
    if packed < len(found.layers):
        typer.echo(f"{packed} of {len(found.layers)} caches can be compressed")
    most = found.tokens_in(size)
    at = tokens or max(1, max(found.tokens_in(size, spec) for spec in parsed))
    rows = [("cache", "tokens that fit", f"bytes at {at}", "speed at best")]
    rows.append(("fp16", str(most), decimal(found.cache_bytes(at)), "1.00"))
    for spec in parsed:
        speed = found.speed(at, spec)
        fit, size_there = found.tokens_in(size, spec), found.cache_bytes(at, spec)
        told = "not timed" if speed is None else f"{speed:.2f}"
        rows.append((str(spec), str(fit), decimal(size_there), told))
    typer.echo()
    for name, fit_text, bytes_text, told in rows:
        typer.echo(f"{name:20s} {fit_text:>15s} {bytes_text:>18s} {told}")
    typer.echo(
        "\nspeed at best: tokens per second over fp16's at that length if reading "
        "memory\nis all that takes time, codes counted as often as their decoding was "
        "measured to\ncost on an NVIDIA H200; no Mac has been measured"
    )
    if most == 0:
        typer.echo("the weights alone do not fit", err=True)


def warn_if_tight(footprint: Footprint, tokens: int, spec: CacheSpec | None) -> None:
    """Say so on stderr if ``tokens`` will not fit in this machine's memory."""
    from .. import memory

    warning = memory.tight_memory_warning(
        footprint, tokens, spec, memory.machine_memory()
    )
    if warning is not None:
        typer.echo(f"warning: {warning}", err=True)

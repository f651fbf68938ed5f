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
    size = opt.size("--memory", memory) or memory_of_machine()

    from ..explanation import size_text
    from ..integrations.footprint import footprint

    found = footprint(model or opt.DEFAULT_MODEL)
    typer.echo(
        f"weights {size_text(found.weights)}, memory {size_text(size)}, context "
        f"{found.context or 'unknown'}{'' if found.context is None else ' tokens'}"
    )
    packed = sum(layer.packed for layer in found.layers)
    if packed < len(found.layers):
        typer.echo(f"{packed} of {len(found.layers)} caches can be compressed")
    most = found.tokens_in(size)
    at = tokens or max(1, max(found.tokens_in(size, spec) for spec in parsed))
    rows = [("cache", "tokens that fit", f"bytes at {at}", "speed at best")]
    rows.append(("fp16", str(most), size_text(found.cache_bytes(at)), "1.00"))
    for spec in parsed:
        speed = found.speed(at, spec)
        fit, size_there = found.tokens_in(size, spec), found.cache_bytes(at, spec)
        told = "not timed" if speed is None else f"{speed:.2f}"
        rows.append((str(spec), str(fit), size_text(size_there), told))
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


def memory_of_machine() -> int:
    """Bytes that MLX may use: the GPU's working set, or this machine's memory."""
    import mlx.core as mx

    info = mx.device_info()
    size = info.get("max_recommended_working_set_size") or info.get("memory_size")
    if size:
        return int(size)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def warn_if_tight(found: Footprint, tokens: int, spec: CacheSpec | None) -> None:
    """Say so on stderr if ``tokens`` will not fit in this machine's memory."""
    size = memory_of_machine()
    if spec is not None and spec.adaptive:
        spec = CacheSpec.parse(round(spec.budget or 3))
    fits = found.tokens_in(size, spec)
    if fits >= min(tokens, found.context or tokens):
        return
    from ..explanation import size_text

    need = found.weights + found.cache_bytes(tokens, spec)
    ways = ["3"] if spec is None else ["2", "2,codec=trellis"]
    better = {way: found.tokens_in(size, CacheSpec.parse(way)) for way in ways}
    best = max(better, key=lambda way: better[way])
    hint = f"; --kv-bits {best} holds {better[best]}" if better[best] > fits else ""
    typer.echo(
        f"warning: {tokens} tokens need {size_text(need)} with the weights, this "
        f"machine has {size_text(size)}, enough for {fits}{hint}",
        err=True,
    )

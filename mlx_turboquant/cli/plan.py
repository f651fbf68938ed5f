"""``mlx_tq.plan``: how many tokens fit in memory, and what each preset costs.

Owns the table; the arithmetic is `memory`'s.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt
from .entry import standalone
from .tables import print_table

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
    kv_memory: Annotated[
        str | None,
        typer.Option(help="Also what mlx_tq.server --kv-memory takes, as 4GB."),
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(
            help="Of what is not compressed, on the machine to plan for. Default: what "
            "the model has on this one; on a CPU, float32."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=opt.MOST_TOKENS, help="Also say the bytes of so many tokens."
        ),
    ] = None,
) -> None:
    """Say how long a context fits in memory, from a model's config alone."""
    presets = [CacheSpec.parse(spec) for spec in specs or _PRESETS]
    for spec in presets:
        if spec.adaptive:
            raise SpecError(
                f"the bits of {spec} are chosen from the text; plan with those it may "
                "choose, such as 3 or 2"
            )
        if spec.evict != "sliding":
            raise SpecError(
                f"{spec} drops pages under a limit on tokens, and a plan says how many "
                "fit without one; leave evict out"
            )
    memory_bytes = opt.size("--memory", memory, least=1)
    kv_bytes = opt.size("--kv-memory", kv_memory, least=1)

    import mlx.core as mx
    from rich.filesize import decimal

    from ..integrations.footprint import footprint as footprint_of
    from ..memory import machine_memory

    memory_bytes = memory_bytes or machine_memory()
    footprint = footprint_of(
        opt.DEFAULT_MODEL if model is None else model,
        None if dtype is None else getattr(mx, dtype),
    )
    plain = f"fp{8 * footprint.itemsize}"
    context = "unknown" if footprint.context is None else f"{footprint.context} tokens"
    typer.echo(
        f"weights {decimal(footprint.weights)}, memory {decimal(memory_bytes)}, "
        f"context {context}"
    )
    compressible = sum(entry.is_compressed for entry in footprint.layers)
    if compressible < len(footprint.layers):
        typer.echo(
            f"{compressible} of {len(footprint.layers)} caches can be compressed"
        )
    fp16_tokens = footprint.tokens_in(memory_bytes)
    fitting_tokens = [footprint.tokens_in(memory_bytes, spec) for spec in presets]
    at_tokens = tokens or max(1, *fitting_tokens)

    def served(stored: CacheSpec | None) -> list[str]:
        if kv_bytes is None:
            return []
        return [str(footprint.tokens_in_cache(kv_bytes, stored))]

    # What decoding costs was measured on an NVIDIA GPU: it says nothing of others.
    is_timed = mx.cuda.is_available()

    def timed(stored: CacheSpec | None) -> list[str]:
        if not is_timed:
            return []
        speed = 1.0 if stored is None else footprint.speed(at_tokens, stored)
        return ["not timed" if speed is None else f"{speed:.2f}"]

    rows = []
    fits = zip([None, *presets], [fp16_tokens, *fitting_tokens], strict=True)
    for stored, fitting in fits:
        peak = footprint.weights + footprint.prompt_bytes(at_tokens, stored)
        rows.append(
            (
                plain if stored is None else str(stored),
                str(fitting),
                decimal(footprint.cache_bytes(at_tokens, stored)),
                decimal(peak),
                *timed(stored),
                *served(stored),
            )
        )
    typer.echo(f"\nat {at_tokens} tokens:")
    print_table(
        rows,
        head=(
            *("cache", "tokens that fit", "cache", "peak"),
            *(("speed at best",) if is_timed else ()),
            *(() if kv_memory is None else (f"in {kv_memory} of cache",)),
        ),
        right_aligned=(1, 2, 3, 4, 5),
    )
    typer.echo("\npeak: while the prompt is read in chunks of 2048, weights included")
    typer.echo(
        f"speed at best: tokens per second over {plain}'s at that length if reading "
        "memory\nis all that takes time, codes counted as often as their decoding was "
        "measured to\ncost on an NVIDIA H100"
        if is_timed
        else "speed: said on NVIDIA GPUs alone, on which what decoding costs was timed"
    )
    if fp16_tokens == 0:
        typer.echo("the weights alone do not fit", err=True)


main = standalone(plan)

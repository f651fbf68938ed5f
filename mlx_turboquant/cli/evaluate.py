"""``mlx_tq.eval``: what caches cost a model, as a table, a page and plots.

Owns the options; the measuring is `evals`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt
from .entry import standalone
from .progress import progress_bar, wait_for_proofs

_SPECS_HELP = (
    "Caches to compare, each as for --kv-bits with options after commas "
    "(3 k4v3,window=64). Default: the three qualities of auto, 4, 3 and 2 bits."
)


def evaluate(
    specs: Annotated[list[str] | None, typer.Argument(help=_SPECS_HELP)] = None,
    model: opt.Model = None,
    adapter_path: opt.AdapterPath = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    text: Annotated[
        str | None, typer.Option(help="UTF-8 text to read. Default: bundled books.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder of the results; an unfinished run goes on.")
    ] = "mlx_tq-eval",
    lengths: Annotated[
        str | None, typer.Option(help="Context lengths to score at, as 1024,2048.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Stretches of text to read.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Rotation seeds, spread over the windows.")
    ] = None,
    scored: Annotated[
        int | None, typer.Option(help="Tokens scored in chunks at each length.")
    ] = None,
    stepped: Annotated[
        int | None, typer.Option(help="Tokens scored one by one at each length.")
    ] = None,
    needles: Annotated[
        str | None,
        typer.Option(help="Lengths to hide facts at, as 1000,3500; 0: none."),
    ] = None,
    greedy: Annotated[
        int | None, typer.Option(help="Tokens to generate greedily; 0: none.")
    ] = None,
    layers: Annotated[
        bool, typer.Option(help="Also compress one layer at a time.")
    ] = False,
    long: Annotated[
        int | None,
        typer.Option(help="Tokens of the model's own text to read; 0: none."),
    ] = None,
    written: Annotated[
        int | None,
        typer.Option(help="Tokens of those that each cache writes itself."),
    ] = None,
    bounds: Annotated[
        bool, typer.Option(help="Bound the error of attention; see docs/quality.md.")
    ] = False,
    max_kv_size: opt.MaxKvSize = None,
    pathologies: Annotated[
        bool,
        typer.Option(help="Also score under transforms that make the cache hard."),
    ] = False,
    baselines: Annotated[
        bool, typer.Option(help="Compare with mlx-lm's caches and rotated ones.")
    ] = True,
) -> None:
    """Measure KL divergence, retrieval and bytes of compressed KV caches."""
    spec_texts = [str(CacheSpec.parse(spec)) for spec in specs or ()]
    plan_options: dict[str, Any] = {
        "lengths": _numbers("--lengths", lengths),
        "needles": _numbers("--needles", needles),
        "windows": windows,
        "seeds": seeds,
        "scored": scored,
        "stepped": stepped,
        "greedy": greedy,
        "layers": layers,
        "long": long,
        "written": written,
        "bounds": bounds,
        "max_kv_size": max_kv_size,
    }

    from .. import evals
    from ..backends import select
    from ..evals import grid, report
    from ..evals.long import PROMPT
    from ..evals.pathologies import NAMES
    from ..integrations.factory import make_prompt_cache
    from .session import Session

    plan = evals.EvalPlan(
        **{name: value for name, value in plan_options.items() if value is not None}
    )
    session = Session(model, adapter_path, trust_remote_code)
    session.check_context(
        max(
            (
                *plan.lengths,
                *plan.needles,
                *(length + plan.greedy for length in plan.lengths[:1]),
                PROMPT + plan.long if plan.long else 0,
            )
        ),
        subject="the longest text has",
        remedy="lower --lengths, --needles or --long, or --greedy",
    )
    if select.awaits_proof():
        # Begun before the first job, so that every job is measured on one backend.
        for spec in spec_texts or grid.SPECS:
            make_prompt_cache(session.network, spec, max_kv_size)
        wait_for_proofs()
    with progress_bar() as progress:
        results = evals.evaluate(
            session.network,
            session.tokenizer,
            spec_texts or grid.SPECS,
            # mlx-lm's quantized caches have no limit.
            baselines=grid.BASELINES if baselines and not max_kv_size else ("fp",),
            plan=plan,
            text_file=text,
            pathology=NAMES if pathologies else (),
            folder=out,
            name=session.name,
            progress=progress,
        )
    typer.echo(report.as_text(results))
    paths = report.write(results, Path(out))
    typer.echo("\nwritten: " + ", ".join(str(path) for path in paths))
    if not any(path.suffix == ".png" for path in paths):
        typer.echo("for plots: pip install 'mlx-tq[plots]'", err=True)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of a list such as ``1024,2048``, zeros left out; None without one.

    Raises:
        SpecError: if a part of the list is not a whole number.
    """
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"{option} {text!r} is not a list such as 1024,2048") from None
    return tuple(number for number in numbers if number)


main = standalone(evaluate)

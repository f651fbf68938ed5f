"""``mlx_tq.eval``: what caches cost a model, as a table, a page and plots.

Owns the options and the progress bar; the measuring is `evals`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import blas
from ..errors import SpecError
from ..spec import CacheSpec
from . import options as opt

if TYPE_CHECKING:
    from ..evals import EvalPlan
    from ..evals.evaluate import Progress

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
    pathologies: Annotated[
        bool,
        typer.Option(help="Also score under transforms that make the cache hard."),
    ] = False,
    baselines: Annotated[
        bool, typer.Option(help="Compare with mlx-lm's caches and rotated ones.")
    ] = True,
) -> None:
    """Measure KL divergence, retrieval and bytes of compressed KV caches."""
    parsed = [str(CacheSpec.parse(spec)) for spec in specs or ()]
    blas.prefer_openblas()

    from ..evals import EvalPlan, report
    from ..evals import evaluate as run
    from ..evals.grid import BASELINES, SPECS
    from ..evals.pathologies import NAMES
    from ..integrations.loading import load

    given: dict[str, Any] = {
        "lengths": _numbers("--lengths", lengths),
        "needles": _numbers("--needles", needles),
        "windows": windows,
        "seeds": seeds,
        "scored": scored,
        "stepped": stepped,
        "greedy": greedy,
        "layers": layers,
    }
    plan = EvalPlan(**{k: v for k, v in given.items() if v is not None})
    name = model or opt.DEFAULT_MODEL
    network, tokenizer = load(
        name,
        adapter_path=adapter_path,
        tokenizer_config={"trust_remote_code": True if trust_remote_code else None},
    )
    _check_context(network, plan)
    with _bar() as progress:
        found = run(
            network,
            tokenizer,
            parsed or SPECS,
            baselines=BASELINES if baselines else ("fp",),
            plan=plan,
            text_file=text,
            pathology=NAMES if pathologies else (),
            folder=out,
            name=name,
            progress=progress,
        )
    typer.echo(report.as_text(found))
    written = report.write(found, Path(out))
    typer.echo("\nwritten: " + ", ".join(str(path) for path in written))
    if not any(path.suffix == ".png" for path in written):
        typer.echo("for plots: pip install 'mlx-turboquant[plots]'", err=True)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"{option} {text!r} is not a list such as 1024,2048") from None
    return tuple(number for number in numbers if number)


def _check_context(network: Any, plan: EvalPlan) -> None:
    from ..integrations.loading import context_length

    limit = context_length(network)
    longest = max((*plan.lengths, *plan.needles))
    if limit is not None and longest > limit:
        raise SpecError(
            f"{longest} tokens are more than the model's context of {limit}; "
            "lower --lengths or --needles"
        )


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on stderr; plain terminals and files see nothing of it."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )

"""The ``mlx_tq`` command: the list of its subcommands.

Heavy imports stay inside the commands, so ``--help`` is instant.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from .. import __version__
from .cache_prompt import cache_prompt
from .chat import chat
from .doctor import doctor
from .entry import with_short_errors
from .evaluate import evaluate
from .generate import generate
from .plan import plan
from .serve import serve

COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "doctor": doctor,
    "eval": evaluate,
    "cache_prompt": cache_prompt,
    "chat": chat,
    "plan": plan,
    "server": serve,
}

main = typer.Typer(
    name="mlx_tq",
    help="TurboQuant KV caches for MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"mlx-tq {__version__}")
        raise typer.Exit


@main.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="And exit."
    ),
) -> None:
    """TurboQuant KV caches for MLX."""


for _name, _command in COMMANDS.items():
    main.command(_name)(with_short_errors(_command))

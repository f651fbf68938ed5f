"""The ``mlx_tq`` command and what all commands share.

Owns the list of commands and the way errors reach the user: one line, exit code 2,
no traceback. Heavy imports stay inside the commands, so ``--help`` is instant.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from .. import __version__
from ..errors import TurboQuantError
from .cache_prompt import cache_prompt
from .chat import chat
from .doctor import doctor
from .evaluate import evaluate
from .generate import generate
from .plan import plan
from .serve import serve

P = ParamSpec("P")

app = typer.Typer(
    name="mlx_tq",
    help="TurboQuant KV caches for MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mlx-turboquant {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="And exit."
    ),
) -> None:
    """TurboQuant KV caches for MLX."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn this package's errors into one line on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TurboQuantError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output went away
            raise typer.Exit(0) from None

    return run


app.command()(guarded(generate))
app.command()(guarded(doctor))
app.command("eval")(guarded(evaluate))
app.command("cache_prompt")(guarded(cache_prompt))
app.command()(guarded(chat))
app.command()(guarded(plan))
app.command("server")(guarded(serve))


def main() -> None:
    """Entry point of ``mlx_tq``."""
    app()


def main_generate() -> None:
    """Entry point of ``mlx_tq.generate``, mlx-lm's spelling of a command."""
    _run_alone(generate)


def main_doctor() -> None:
    """Entry point of ``mlx_tq.doctor``."""
    _run_alone(doctor)


def main_eval() -> None:
    """Entry point of ``mlx_tq.eval``."""
    _run_alone(evaluate)


def main_cache_prompt() -> None:
    """Entry point of ``mlx_tq.cache_prompt``."""
    _run_alone(cache_prompt)


def main_chat() -> None:
    """Entry point of ``mlx_tq.chat``."""
    _run_alone(chat)


def main_plan() -> None:
    """Entry point of ``mlx_tq.plan``."""
    _run_alone(plan)


def main_server() -> None:
    """Entry point of ``mlx_tq.server``."""
    _run_alone(serve)


def _run_alone(command: Callable[..., None]) -> None:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(guarded(command))
    single()

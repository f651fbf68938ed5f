"""How a command is run: alone (``mlx_tq.chat``) or as one of ``mlx_tq``'s.

Owns the way errors reach the user: one line, exit code 2, no traceback.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from ..errors import TurboQuantError

P = ParamSpec("P")


def with_short_errors(command: Callable[P, None]) -> Callable[P, None]:
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


def standalone(command: Callable[..., None]) -> typer.Typer:
    """A program of one command, as a module's ``main`` for its console script."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(with_short_errors(command))
    return program

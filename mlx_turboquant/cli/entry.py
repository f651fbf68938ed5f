"""How a command is run: alone (``mlx_tq.chat``) or as one of ``mlx_tq``'s.

Owns the way errors reach the user (one line, exit code 2, no traceback) and the three
standard streams: which of them there are, and in which encoding.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from ..errors import TurboQuantError

P = ParamSpec("P")
#: On Linux, MLX's shared library is in a package of its own.
_MLX_REMEDY = (
    "; pip install 'mlx-tq[cpu]', or 'mlx-tq[cuda]' with an NVIDIA GPU and its driver"
    if sys.platform == "linux"
    else ""
)


def with_short_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn this package's errors into one line on stderr and exit code 2.

    The system's own errors are such a line, too: the path and the reason. So is an MLX
    that cannot be loaded.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _open_streams()
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except TurboQuantError as error:
            _fail(str(error))
        except ImportError as error:
            # Of a library that is missing, the path is that of who needs it.
            if os.path.basename(os.path.dirname(error.path or "")) != "mlx":
                raise
            _fail(f"MLX cannot be loaded ({error}){_MLX_REMEDY}")
        except BrokenPipeError:
            _drop_output()  # its reader went away
            raise typer.Exit(0) from None
        except OSError as error:
            if error.filename is None:  # no path of ours: what we print to is full
                _drop_output()
                _fail(f"cannot write the output ({error.strerror or error})")
            _fail(f"{_path_text(error.filename)}: {error.strerror or error}")

    return run


def standalone(command: Callable[..., None]) -> typer.Typer:
    """A program of one command, as a module's ``main`` for its console script."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(with_short_errors(command))
    return program


def _fail(message: str) -> None:
    line = " ".join(message.splitlines())
    typer.echo(f"error: {line}", err=True)
    raise typer.Exit(2) from None


def _path_text(path: str | bytes | int) -> str:
    text = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
    return text or "''"


def _open_streams() -> None:
    """See to it that there are three streams, and that none fails on a character.

    A number that is free would be given to the next file: MLX takes a model's file for
    unreadable if that is 0. Texts in files and pipes are UTF-8 whatever the locale is;
    bytes that are not become lone surrogates, which `options.checked_text` refuses.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def _drop_output() -> None:
    """Have nothing more to write, or the interpreter would try again as it ends."""
    output = sys.__stdout__
    if output is None or sys.stdout is not output:  # a caller's own stream
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, output.fileno())
    os.close(nothing)

"""The progress bar: on stderr, at a terminal, gone when the work is done.

And the lines around what has to be waited for once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Prompts of fewer tokens are read without a bar.
_LONG_PROMPT = 1024


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar, moved by calls with (what is being done, how much is done, of how much).

    It goes when all is done or the block ends: what is printed next has the line.
    Files and pipes see nothing of it.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    bar = Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting", total=None)

    def report(description: str, done: int, total: int) -> None:
        bar.update(task, description=description, completed=done, total=total)
        if done >= total:
            bar.stop()

    with bar:
        yield report


@contextmanager
def prefill_progress(
    prompt_tokens: int, is_wanted: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """mlx-lm's ``prompt_progress_callback`` for a long prompt, or None."""
    if not is_wanted or prompt_tokens < _LONG_PROMPT:
        yield None
        return
    with progress_bar() as report:
        yield lambda done, total: report("reading the prompt", done, total)


def wait_for_proofs(is_wanted: bool = True) -> None:
    """Until the kernels that new caches need are checked; lines on stderr if wanted.

    At a terminal one of them says how far it is, until the next takes its place.
    """
    import shutil
    import sys

    import typer

    from ..integrations import proofs

    empty_line = ""

    def say(line: str) -> None:
        nonlocal empty_line
        if is_wanted:
            typer.echo(f"{empty_line}{line}", err=True)
        empty_line = ""

    def show(line: str) -> None:
        nonlocal empty_line
        if is_wanted and sys.stderr.isatty():
            empty_line = "\r\x1b[K"
            # A line that is broken in two could not be taken back.
            line = line[: shutil.get_terminal_size().columns - 1]
            typer.echo(f"{empty_line}{line}", err=True, nl=False)

    try:
        proofs.wait(say, show)
    finally:
        typer.echo(empty_line, err=True, nl=False)  # after Ctrl-C there is one

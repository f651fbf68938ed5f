"""A progress bar while a long prompt is read.

Owns when one is shown: at a terminal, for a prompt that takes a while.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Prompts shorter than this show none.
_LONG_PROMPT = 1024


@contextmanager
def reading(
    total: int, wanted: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """mlx-lm's ``prompt_progress_callback`` for ``total`` tokens, or None."""
    if not wanted or total < _LONG_PROMPT or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("reading the prompt", total=total)
    bar.start()

    def report(done: int, _: int) -> None:
        bar.update(task, completed=done)
        if done >= total:
            bar.stop()

    try:
        yield report
    finally:
        bar.stop()

"""Tables on stdout, as every command prints them: no lines, no cut cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def print_table(
    rows: Iterable[Sequence[str]],
    head: Sequence[str] = (),
    right_aligned: Sequence[int] = (),
) -> None:
    """Print rows of cells in columns.

    Args:
        rows: The cells' texts, all rows of the same length.
        head: Texts of the first line; no such line if empty.
        right_aligned: Indices of columns of numbers.
    """
    from rich.console import Console
    from rich.table import Table

    lines = [tuple(row) for row in rows]
    table = Table(box=None, pad_edge=False, show_header=bool(head))
    for index in range(len(lines[0])):
        table.add_column(
            head[index] if head else "",
            justify="right" if index in right_aligned else "left",
            no_wrap=True,
        )
    for line in lines:
        table.add_row(*line)
    # A pipe counts as 80 columns wide, which would cut cells that are read by programs.
    Console(width=1000, markup=False, highlight=False, emoji=False).print(table)

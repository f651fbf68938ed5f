"""An `Evaluation` for people: a text table, and one HTML page with its plots.

Without matplotlib the page has tables only.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..atomic import replacing
from ..explanation import table_text
from . import long
from .long_report import bound_cells, long_cells
from .results import Evaluation, Row

_HEAD = (
    "cache",
    "tokens",
    "bits",
    "KLD",
    "95% interval",
    "p99",
    "max",
    "top-1",
    "ppl",
    "by token",
    "MB",
    "needles",
    "same text",
)
Cells = list[list[str]]
_UNCUT = 1000  # columns of text, more than any table has


def cells(results: Evaluation) -> Cells:
    """The main table: a row per cache and length, numbers as text.

    ``by token`` is the KLD of the tokens that were read one by one; ``MB`` what one
    window's cache holds in memory, capacity included; ``needles`` how many hidden facts
    were found at all lengths and depths; ``same text`` the median number of greedily
    chosen tokens before the text parts from the uncompressed cache's.
    """
    stepped = {(r.name, r.length): r for r in results.rows(mode="stepped")}
    rows = results.rows()
    longest = max((row.length for row in rows), default=0)
    table = []
    for row in rows:
        last = row.length == longest
        step = stepped.get((row.name, row.length))
        table.append(
            [
                row.name,
                str(row.length),
                f"{row.bits:.2f}",
                f"{row.kld:.3g}",
                f"{row.low:.3g}..{row.high:.3g}",
                f"{row.p99:.3f}",
                f"{row.worst:.2f}",
                f"{100 * row.top1:.1f}%",
                f"{row.perplexity:.2f}",
                f"{step.kld:.3g}" if step else "",
                f"{_megabytes(results, row):.1f}",
                _needles(results, row.name) if last else "",
                _greedy(results, row.name) if last else "",
            ]
        )
    return table


def pathology_cells(results: Evaluation) -> tuple[list[str], Cells]:
    """Head and rows of KLD by pathology and cache, longest length, times as it is."""
    names = dict.fromkeys(job["pathology"] for job in results.of_kind("score"))
    plain = {row.name: row for row in results.rows()}  # the longest length wins
    if len(names) < 2 or not plain:
        return [], []
    table = []
    for transform in names:
        rows = {row.name: row for row in results.rows(transform)}
        line = [transform or "as it is"]
        for name in plain:
            row = rows.get(name)
            times = row.kld / max(plain[name].kld, 1e-12) if row else 0
            line.append(f"{row.kld:.4g} ({times:.1f}x)" if row else "")
        table.append(line)
    return ["pathology", *plain], table


def as_text(results: Evaluation) -> str:
    """Everything as tables on paper."""
    about = results.about
    lines = [
        f"{about['model']} on {about['text']}; MLX {about['mlx']}, {about['device']}, "
        f"{about['machine']}",
        "KLD in nats per token against the uncompressed cache; bits are all stored "
        "bits per element at that length",
    ]
    if limit := about["plan"].get("max_kv_size"):
        lines.append(f"Caches keep {limit} tokens; the one they are held to keeps all")
    for title, head, rows in _tables(results):
        lines += ["", *([title, ""] if title else []), _text(head, rows)]
    return "\n".join(lines)


def write(results: Evaluation, folder: Path) -> list[Path]:
    """Write ``table.txt``, ``report.html`` and the plots; returns what was written."""
    from . import plots

    images = plots.write(results, folder)
    paths = [folder / "table.txt", folder / "report.html"]
    contents = (as_text(results) + "\n", _page(results, images))
    for path, content in zip(paths, contents, strict=True):
        with replacing(path) as file:
            file.write_text(content, encoding="utf-8")
    return [*paths, *images]


def _tables(results: Evaluation) -> Iterator[tuple[str, Sequence[str], Cells]]:
    """Title, head and rows of every table there is something for."""
    plan = results.about["plan"]
    main = cells(results)
    if main:
        yield "", _HEAD, main
    for title, (head, rows) in {
        "KLD under transforms that leave the output as it is": pathology_cells(results),
        f"The model's own text of {plan['long']} tokens, behind a prompt of "
        f"{long.PROMPT}": long_cells(results),
        "Errors of attention's output in decode steps, relative": bound_cells(results),
    }.items():
        if rows:
            yield title, head, rows


def _text(head: Sequence[str], rows: Cells) -> str:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table_text(table, width=_UNCUT)


def _megabytes(results: Evaluation, row: Row) -> float:
    sizes: list[int] = [
        span["nbytes"]
        for job in results.of_kind("score")
        if (job["name"], job["pathology"]) == (row.name, "")
        for span in job["spans"]
        if span["length"] == row.length
    ]
    return max(sizes) / 1e6


def _needles(results: Evaluation, name: str) -> str:
    answers = [
        answer
        for job in results.of_kind("needle")
        if job["name"] == name
        for answer in job["answers"]
    ]
    if not answers:
        return ""
    return f"{sum(a['found'] for a in answers)}/{len(answers)}"


def _greedy(results: Evaluation, name: str) -> str:
    same = sorted(j["same"] for j in results.of_kind("greedy") if j["name"] == name)
    if not same:
        return ""
    return f"{same[len(same) // 2]}/{results.about['plan']['greedy']}"


def _page(results: Evaluation, images: list[Path]) -> str:
    tables = [
        (f"<h2>{html.escape(title)}</h2>" if title else "") + _html(list(head), rows)
        for title, head, rows in _tables(results)
    ]
    pictures = "".join(
        f'<figure><img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in images
    )
    about = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in results.about.items()
    )
    return (
        "<!doctype html><meta charset=utf-8><title>KV-cache quality</title><style>"
        "body{font:15px/1.5 system-ui;margin:2rem auto;max-width:75rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
        "dt{float:left;clear:left;width:6rem;color:#666}</style>"
        f"<h1>KV-cache quality: {html.escape(results.about['model'])}</h1>"
        f"{''.join(tables[:1])}{pictures}{''.join(tables[1:])}<dl>{about}</dl>\n"
    )


def _html(head: list[str], rows: Cells) -> str:
    def line(tag: str, row: list[Any]) -> str:
        inner = "".join(f"<{tag}>{html.escape(str(x))}</{tag}>" for x in row)
        return f"<tr>{inner}</tr>"

    return (
        f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
    )

"""The picture of README and docs/quality.md: divergence against stored bits.

    python benchmarks/draw_frontier.py          # docs/pictures/frontier.svg

Reads the logs of `mlx_tq.eval` in results/; the picture says which, by their digest, so
that a test sees whether it is still theirs. Needs matplotlib.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
LOGS = tuple(ROOT / "benchmarks" / "results" / name for name in ("eval-h100.txt",))
PICTURE = ROOT / "docs" / "pictures" / "frontier.svg"
TOKENS = 2048
#: A row of `mlx_tq.eval`'s table: cache, tokens, bits, KLD, its interval.
_ROW = re.compile(
    r"^(\S+) +(\d+) +([\d.]+) +([\d.e-]+) +([\d.]+(?:e-\d+)?)\.\.(\S+)", re.M
)
#: Series: what the names of its caches match, color, marker, and where labels go; None
#: where they would hide others.
SERIES = {
    "mlx-lm's caches": (r"affine:\d", "#c0392b", "s", (8, 4)),
    "the same, rotated": (r"rotated-affine:\d", "#e59866", "s", (8, -10)),
    "bits said": (r"k\dv\d", "#1f5fa8", "o", (8, 4)),
    "bits chosen by layer": (r"auto,quality=\w+", "#2e8b57", "D", (-8, -10)),
    "trellis": (r"k([\d.]+)v\1,codec=trellis", "#7d3c98", "^", (-8, -3)),
    "trellis, by layer": (r"auto,codec=trellis,quality=\w+", "#b58bd6", "v", None),
}


class Point(NamedTuple):
    """One cache: bits stored an element, nats a token, and the interval."""

    name: str
    bits: float
    kld: float
    low: float
    high: float


def points() -> list[Point]:
    """Every cache that the logs have at `TOKENS` tokens."""
    rows = [row for log in LOGS for row in _ROW.findall(log.read_text())]
    return [
        Point(name, *map(float, numbers))
        for name, tokens, *numbers in rows
        if int(tokens) == TOKENS
    ]


def digest() -> str:
    """Of the logs, as the picture has it."""
    whole = b"".join(log.read_bytes() for log in LOGS)
    return "logs " + hashlib.sha256(whole).hexdigest()[:16]


def label(name: str) -> str:
    """What a user would say to have a cache."""
    if "affine" in name:
        return f"{'rotated ' * ('rot' in name)}kv_bits={name[-1]}"
    if name.startswith("auto"):
        return f"auto, {name.partition('quality=')[2]}"
    bits = name[1:].partition("v")[0]
    if "trellis" in name:
        return f"trellis {bits}"
    return f"--kv-bits {bits if name.count(bits) == 2 else name}"


def draw(path: Path) -> None:
    """Write the picture as SVG, the same for the same logs and matplotlib."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for series, (pattern, color, marker, offset) in SERIES.items():
        own = sorted(p for p in points() if re.fullmatch(pattern, p.name))
        own.sort(key=lambda point: point.bits)
        axes.errorbar(
            [p.bits for p in own],
            [p.kld for p in own],
            [[p.kld - p.low for p in own], [p.high - p.kld for p in own]],
            color=color,
            marker=marker,
            linewidth=1.2,
            capsize=2,
            label=series,
        )
        for p in own if offset else ():
            axes.annotate(
                label(p.name),
                (p.bits, p.kld),
                textcoords="offset points",
                xytext=offset,
                ha="left" if offset[0] > 0 else "right",
                fontsize=8,
                color=color,
            )
    axes.set(
        yscale="log",
        xlim=(2, 9.5),
        xlabel=f"bits stored per element, everything counted, at {TOKENS:,} tokens",
        ylabel="KL divergence, nats a token",
    )
    axes.set_title(
        "What a cache costs: less to the left and below is better", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    options = {
        "svg.hashsalt": "frontier",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(options):
        figure.savefig(path, metadata={"Date": None, "Description": digest()})


if __name__ == "__main__":
    draw(PICTURE)

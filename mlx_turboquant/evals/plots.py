"""Plots of an `Evaluation` as PNG: KLD by stored bits and position, needles, layers.

They need matplotlib, an extra of this package (``plots``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import replacing
from .results import Evaluation


def write(results: Evaluation, folder: Path) -> list[Path]:
    """Write every plot there is something for; none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    plots: dict[str, Callable[[Any, Evaluation], bool]] = {
        "kld-by-bits": _kld_by_bits,
        "needles": _needles,
        "layers": _layers,
        "long": _long,
    }
    paths = []
    for name, draw in plots.items():
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure, results):
            path = folder / f"{name}.png"
            with replacing(path) as file:
                figure.savefig(file, dpi=110)
            paths.append(path)
    return paths


def _family(name: str) -> str:
    if ":" in name and "affine" in name:
        return "mlx-lm affine" if name.startswith("affine") else "rotated affine"
    return "this package"


def _kld_by_bits(figure: Any, results: Evaluation) -> bool:
    rows = [row for row in results.rows() if row.name != "fp"]
    if not rows:
        return False
    longest = max(row.length for row in rows)
    axes = figure.subplots()
    for family in ("mlx-lm affine", "rotated affine", "this package"):
        family_rows = sorted(
            (r for r in rows if r.length == longest and _family(r.name) == family),
            key=lambda row: row.bits,
        )
        if not family_rows:
            continue
        kld = np.array([row.kld for row in family_rows])
        below = kld - [row.low for row in family_rows]
        above = [row.high for row in family_rows] - kld
        axes.errorbar(
            [r.bits for r in family_rows],
            kld,
            np.abs([below, above]),
            label=family,
            marker="o",
        )
        for row in family_rows:
            axes.annotate(
                row.name,
                (row.bits, row.kld),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize=8,
            )
    floor = [r.kld for r in results.rows() if (r.name, r.length) == ("fp", longest)]
    if floor and floor[0] > 0:
        axes.axhline(floor[0], color="grey", linestyle=":", label="self-noise")
    axes.set_yscale("log")
    axes.set_xlabel(f"stored bits per element at {longest:,} tokens")
    axes.set_ylabel("KL divergence, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return True


def _needles(figure: Any, results: Evaluation) -> bool:
    jobs = results.of_kind("needle")
    if not jobs:
        return False
    names = list(dict.fromkeys(job["name"] for job in jobs))
    lengths = sorted({a["length"] for job in jobs for a in job["answers"]})
    depths = sorted({a["depth"] for job in jobs for a in job["answers"]})
    columns = min(5, len(names))
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        hits = np.full((len(depths), len(lengths)), np.nan)
        for job in jobs:
            for a in job["answers"] if job["name"] == name else ():
                place = depths.index(a["depth"]), lengths.index(a["length"])
                hits[place] = a["found"]
        axes.set_axis_on()
        axes.imshow(hits, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{x:,}" for x in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{x:.2f}" for x in depths], fontsize=7)
    figure.supxlabel("tokens of context")
    figure.supylabel("depth of the fact")
    return True


def _layers(figure: Any, results: Evaluation) -> bool:
    jobs = results.of_kind("layer")
    if not jobs:
        return False
    axes = figure.subplots()
    for name in dict.fromkeys(job["name"] for job in jobs):
        own = [job for job in jobs if job["name"] == name]
        kld = [np.mean(np.concatenate([s["kld"] for s in j["spans"]])) for j in own]
        axes.plot([job["layer"] for job in own], kld, marker="o", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("the one layer that is compressed")
    axes.set_ylabel("KL divergence, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return True


def _long(figure: Any, results: Evaluation) -> bool:
    jobs = results.of_kind("long")
    if not jobs:
        return False
    axes = figure.subplots()
    for name in dict.fromkeys(job["name"] for job in jobs if job["name"] != "fp"):
        klds = [np.array(job["kld"]) for job in jobs if job["name"] == name]
        parts = np.array_split(np.mean(klds, axis=0), 16)
        ends = np.cumsum([len(part) for part in parts])
        axes.plot(ends, [part.mean() for part in parts], marker="o", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("tokens behind the prompt, up to")
    axes.set_ylabel("KL divergence, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return True

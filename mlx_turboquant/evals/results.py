"""`Evaluation`: what was measured, its summary, and the file it lives in.

Intervals are 95% percentile bootstraps over
blocks of scored tokens (windows differ more than tokens of one window, but there are
few of them; a block is what one chunk scores).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import replacing
from ..errors import FormatError, SpecError
from ..regular import check_regular
from . import saved as saved_values

_RESAMPLES = 2000
_MAGIC = "mlx_turboquant evaluation 1"
Job = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One cache at one length; see `Evaluation.rows`.

    Attributes:
        name: The cache's name.
        length: Tokens of context.
        mode: ``chunked``, ``stepped`` (token by token) or ``all``.
        bits: All stored bits per element at that length.
        kld: Mean KL divergence from the uncompressed cache, nats per token.
        low: Lower end of its 95% interval.
        high: Upper end of that interval.
        p99: 99th percentile of the tokens' divergences.
        worst: The largest divergence of a token.
        top1: Share of tokens whose most likely successor is the same.
        perplexity: The text's perplexity under this cache.
        tokens: How many tokens were scored.
    """

    name: str
    length: int
    mode: str
    bits: float
    kld: float
    low: float
    high: float
    p99: float
    worst: float
    top1: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Everything measured so far.

    Attributes:
        about: Model, plan, machine and versions.
        jobs: Per job key, what it measured, as plain JSON values.
    """

    about: dict[str, Any]
    jobs: dict[str, Job]

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            FormatError: if it is another kind of file, or damaged.
        """
        try:
            check_regular(path)
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FormatError(
                f"cannot read an evaluation from {path} ({reason}); choose another "
                "folder or remove it"
            ) from error
        if not isinstance(saved, dict) or saved.get("format") != _MAGIC:
            raise FormatError(
                f"{path} is not an evaluation of this version; choose another folder "
                "or remove it"
            )
        saved_values.check(saved, path)
        return cls(saved["about"], saved["jobs"])

    def save(self, path: Path) -> None:
        """Write all of it as JSON, or leave the older file."""
        whole = {"format": _MAGIC, "about": self.about, "jobs": self.jobs}
        with replacing(path) as file:
            file.write_text(json.dumps(whole), encoding="utf-8")

    def check_same(self, about: dict[str, Any], path: Path) -> None:
        """Make sure ``about`` can continue this.

        Raises:
            SpecError: naming what differs.
        """
        for key in ("model", "text", "plan"):
            if self.about[key] != about[key]:
                raise SpecError(
                    f"{path} holds an evaluation with {key} {self.about[key]}, not "
                    f"{about[key]}; choose another folder or remove it"
                )

    def names(self, pathology: str = "") -> list[str]:
        """Caches that were scored, in order."""
        names = (
            job["name"]
            for job in self.of_kind("score")
            if job["pathology"] == pathology
        )
        return list(dict.fromkeys(names))

    def rows(self, pathology: str = "", mode: str = "all") -> list[Row]:
        """Scores by cache and length, all windows together."""
        rows = []
        for name in self.names(pathology):
            spans = [
                span
                for job in self.of_kind("score")
                if (job["name"], job["pathology"]) == (name, pathology)
                for span in job["spans"]
                if mode in ("all", span["mode"])
            ]
            for length in dict.fromkeys(span["length"] for span in spans):
                own = [span for span in spans if span["length"] == length]
                rows.append(_row(name, length, mode, own))
        return rows

    def own_texts(self) -> dict[int, list[int]]:
        """Tokens that the uncompressed cache has written for ``long``, by window."""
        jobs = self.of_kind("long")
        return {job["window"]: job["written"] for job in jobs if job["name"] == "fp"}

    def of_kind(self, kind: str) -> list[Job]:
        """Jobs of one kind: score, needle, greedy, layer, long or bound."""
        return [job for job in self.jobs.values() if job["kind"] == kind]


def _row(name: str, length: int, mode: str, spans: list[dict[str, Any]]) -> Row:
    kld = np.concatenate([np.array(span["kld"]) for span in spans])
    nll = np.concatenate([np.array(span["nll"]) for span in spans])
    low, high = interval([np.array(span["kld"]) for span in spans])
    last = [s for s in spans if s["mode"] == spans[-1]["mode"]]
    return Row(
        name=name,
        length=length,
        mode=mode,
        bits=sum(s["bits"] for s in last) / max(1, sum(s["elements"] for s in last)),
        kld=float(kld.mean()),
        low=low,
        high=high,
        p99=float(np.quantile(kld, 0.99)),
        worst=float(kld.max()),
        top1=sum(span["same"] for span in spans) / len(kld),
        perplexity=float(np.exp(nll.mean())),
        tokens=len(kld),
    )


def interval(
    groups: list[np.ndarray[Any, Any]], block: int = 16
) -> tuple[float, float]:
    """95% bootstrap interval of the mean over blocks of ``block`` tokens."""
    sums, counts = [], []
    for values in groups:
        for at in range(0, len(values), block):
            part = values[at : at + block]
            sums.append(part.sum())
            counts.append(len(part))
    rng = np.random.default_rng(0)
    pick = rng.integers(0, len(sums), size=(_RESAMPLES, len(sums)))
    means = np.array(sums)[pick].sum(1) / np.array(counts)[pick].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)

"""A file for a bug report: what `mlx_tq.doctor` found, without who found it.

Owns what is in it and what is taken out: the home folder, the user's and the machine's
name. It goes nowhere by itself.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from .atomic import replacing
from .proof.key import system_build
from .proof.store import TUNER_LOG, Verdict

#: Characters of a log's end that are enough: a compiler's whole complaint.
_LOG_CHARACTERS = 100_000


def write(
    path: Path,
    machine: Mapping[str, str],
    verdicts: Iterable[Verdict],
    checks: Iterable[str],
    milliseconds: Mapping[str, float],
) -> None:
    """Write a report as JSON, whole or not at all.

    Args:
        path: The file; its folder must exist.
        machine: Names and versions.
        verdicts: Of kernels, whose logs are read.
        checks: What checks in this process said, a line each.
        milliseconds: What was timed.

    Raises:
        OSError: if the file cannot be written.
    """
    report = {
        "machine": dict(machine),
        "system build": system_build(),
        "mlx device": {name: str(value) for name, value in mx.device_info().items()},
        "verdicts": [{**asdict(v), **_logs(v)} for v in verdicts],
        "checks": list(checks),
        "milliseconds": dict(milliseconds),
    }
    with replacing(path) as beside:
        beside.write_text(json.dumps(_without(_names(), report), indent=1) + "\n")


def _logs(verdict: Verdict) -> dict[str, str]:
    """Of a check, and of the tuner that ran last."""
    texts = {"log text": _text_of(verdict.log)}
    if verdict.tuned and verdict.log:
        log = Path(verdict.log).with_suffix(TUNER_LOG)
        texts["tuner log text"] = _text_of(str(log))
    return texts


def _text_of(log: str) -> str:
    """The end of a log; why it cannot be read, if it cannot."""
    if not log:
        return ""
    try:
        return Path(log).read_text(errors="replace")[-_LOG_CHARACTERS:]
    except OSError as error:
        return f"cannot be read: {error}"


def _names() -> list[tuple[re.Pattern[str], str]]:
    """What says who and where, with what takes its place."""
    home = Path.home()
    found = [(re.escape(str(folder)), "~") for folder in (home, home.resolve())]
    user = home.name
    with contextlib.suppress(OSError, KeyError, ImportError):
        user = getpass.getuser()
    for name, shown in ((user, "USER"), (platform.node(), "HOST")):
        if name:
            found.append((rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", shown))
    return [(re.compile(text, re.IGNORECASE), shown) for text, shown in found]


def _without(names: list[tuple[re.Pattern[str], str]], value: Any) -> Any:
    """The same with names taken out of every text in it."""
    if isinstance(value, str):
        for name, shown in names:
            value = name.sub(shown, value)
        return value
    if isinstance(value, dict):
        return {_without(names, k): _without(names, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without(names, each) for each in value]
    return value

"""What ``results.json`` must hold before a run goes on from it.

It is a file in the user's folder, which editors and scripts may have changed: every
value that tables, plots and later jobs use is looked at once, here. What the values
mean is `results`'s and the jobs' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FormatError

Check = Callable[[Any], bool]
_MOST = 2**63 - 1


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_positive(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_number(value: Any) -> bool:
    """Divergences may be infinite, or no number at all."""
    return type(value) is float or (type(value) is int and abs(value) <= _MOST)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_mode(value: Any) -> bool:
    return value in ("chunked", "stepped")


def _list_of(check: Check, least: int = 1) -> Check:
    def is_list(value: Any) -> bool:
        return (
            isinstance(value, list) and len(value) >= least and all(map(check, value))
        )

    return is_list


def _has(fields: Mapping[str, Check]) -> Check:
    def is_object(value: Any) -> bool:
        return isinstance(value, dict) and not _wrong(fields, value)

    return is_object


def _wrong(fields: Mapping[str, Check], value: Mapping[str, Any]) -> str:
    """The first field that is missing or of another kind; or ""."""
    return next(
        (n for n, check in fields.items() if n not in value or not check(value[n])), ""
    )


_SPAN: dict[str, Check] = {
    **dict.fromkeys(("length", "same", "bits", "nbytes"), _is_count),
    **dict.fromkeys(("kld", "nll"), _list_of(_is_number)),
    "elements": _is_positive,
    "mode": _is_mode,
}
_ANSWER: dict[str, Check] = {
    "length": _is_count,
    "depth": _is_number,
    "found": _is_truth,
}
_CALL: dict[str, Check] = {"name": _is_truth, "code": _is_truth}
_BOUND = dict.fromkeys(("true", "expected", "bound", "least"), _is_number)
_SPANS = _list_of(_has(_SPAN))
#: Fields of each kind of job.
_KINDS: dict[str, dict[str, Check]] = {
    "score": {"window": _is_count, "pathology": _is_text, "spans": _SPANS},
    "layer": {"layer": _is_count, "spans": _SPANS},
    "needle": {"answers": _list_of(_has(_ANSWER))},
    "greedy": {"window": _is_count, "same": _is_count},
    "long": {
        **dict.fromkeys(("window", "same", "bits", "parts"), _is_count),
        "kld": _list_of(_is_number),
        "elements": _is_positive,
        "calls": _list_of(_has(_CALL)),
        "written": _list_of(_is_count, least=0),
        "repeats": _is_number,
    },
    "bound": {"length": _is_count, "rows": _list_of(_has(_BOUND))},
}
_ABOUT: dict[str, Check] = {
    **dict.fromkeys(("model", "text", "machine", "device", "mlx"), _is_text),
    "plan": lambda value: isinstance(value, dict),
}


def check(saved: Mapping[str, Any], path: object) -> None:
    """Make sure that an evaluation's JSON is one.

    Args:
        saved: The file's object, with ``about`` and ``jobs``.
        path: The file, for the error.

    Raises:
        FormatError: naming the first job and field that are not.
    """
    about, jobs = saved.get("about"), saved.get("jobs")
    if not isinstance(about, dict) or not isinstance(jobs, dict):
        raise _changed(path, "it has no about and jobs")
    if field := _wrong(_ABOUT, about):
        raise _changed(path, f"{field!r} of what it is about")
    for key, job in jobs.items():
        if not isinstance(job, dict):
            raise _changed(path, f"job {key!r}")
        kind, name = job.get("kind"), job.get("name")
        if not _is_text(kind) or kind not in _KINDS or not key.startswith(f"{kind} "):
            raise _changed(path, f"the kind of job {key!r}")
        if not _is_text(name) or name not in key:
            raise _changed(path, f"the name in job {key!r}")
        if field := _wrong(_KINDS[kind], job) or _uneven(job, about["plan"]):
            raise _changed(path, f"{field!r} of job {key!r}")


def _uneven(job: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """A field with more or fewer values than belong to it; or ""."""
    for span in job.get("spans", ()):
        if not span["same"] <= len(span["kld"]) == len(span["nll"]):
            return "spans"
    if job["kind"] != "long":
        return ""
    if len(job["kld"]) != plan.get("long"):
        return "kld"
    own = job["name"] == "fp"
    return "written" if own and len(job["written"]) != len(job["kld"]) else ""


def _changed(path: object, what: str) -> FormatError:
    return FormatError(
        f"{path} was changed: {what} is missing or wrong; choose another folder or "
        "remove it"
    )

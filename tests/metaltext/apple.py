"""Apple's compiler over every text, by version of the language. Needs Xcode, no GPU.

    PYTHONPATH=tests python -m metaltext FOLDER [--compile]

Owns the commands and what is said of them; `texts` writes the files. A version that the
toolchain does not know is said to be, and does not count as passed; that it knows none
is an error. Warnings are said too, and are no errors: which ones Apple's compiler has
is not known here.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

#: What MLX asks for on macOS 14, 15 and 26.
VERSIONS = ("metal3.1", "metal3.2", "metal4.0")
#: MLX compiles with safe mathematics: masks are infinite.
_FLAGS = ("-Wall", "-fno-fast-math", "-c")
_WARNING = re.compile(r"warning: .*?(\[-W[\w-]+\])?$", re.MULTILINE)
_HELP = (
    "xcrun has no Metal compiler; install Xcode, and from Xcode 26 on run "
    "'xcodebuild -downloadComponent MetalToolchain'"
)


@dataclass
class Report:
    """What a version of the language made of the texts.

    Attributes:
        version: As ``-std`` takes it.
        unknown: What the toolchain says, if it does not know the version.
        passed: Texts compiled.
        errors: Messages by file.
        warnings: How many there are of each kind.
    """

    version: str
    unknown: str = ""
    passed: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        if self.unknown:
            return f"{self.version}: NOT COMPILED, this toolchain says: {self.unknown}"
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.warnings.most_common())
        return (
            f"{self.version}: {self.passed} of {self.passed + len(self.errors)} texts "
            f"compiled; warnings: {kinds or 'none'}"
        )


def compile_all(
    paths: Sequence[Path], workers: int, versions: Sequence[str] = VERSIONS
) -> list[Report]:
    """A report for each version.

    Raises:
        RuntimeError: if there is no compiler, or it knows none of the versions.
    """
    if _metal("--version").returncode:
        raise RuntimeError(_HELP)
    reports = [_compiled(version, paths, workers) for version in versions]
    if all(report.unknown for report in reports):
        said = "; ".join(report.unknown for report in reports)
        raise RuntimeError(f"the toolchain knows none of {', '.join(versions)}: {said}")
    return reports


def _compiled(version: str, paths: Sequence[Path], workers: int) -> Report:
    report = Report(version)
    std, folder = f"-std={version}", paths[0].parent
    tried = _metal(std, *_FLAGS, "-x", "metal", "-o", str(folder / "empty.air"), "-")
    if tried.returncode:
        report.unknown = tried.stderr.strip() or f"exit code {tried.returncode}"
        return report

    def one(path: Path) -> subprocess.CompletedProcess[str]:
        made = path.with_suffix(f".{version}.air")
        return _metal(std, *_FLAGS, "-o", str(made), str(path))

    with ThreadPoolExecutor(workers) as pool:
        for path, done in zip(paths, pool.map(one, paths), strict=True):
            kinds = (kind or "[other]" for kind in _WARNING.findall(done.stderr))
            report.warnings.update(kinds)
            if done.returncode:
                report.errors[path.name] = done.stderr.strip() or "no message"
            else:
                report.passed += 1
    return report


def _metal(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["xcrun", "-sdk", "macosx", "metal", *arguments]
    try:
        return subprocess.run(command, input="", capture_output=True, text=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", "xcrun: not found")

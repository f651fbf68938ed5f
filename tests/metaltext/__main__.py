"""Write every text, and on a Mac compile them: what the macOS workflow runs."""

import argparse
import os
import sys
from pathlib import Path

from . import apple
from .specialisations import specialisations
from .texts import write


def main() -> int:
    """Exit code 1 if a text is refused, or nothing could be compiled."""
    parser = argparse.ArgumentParser(prog="python -m metaltext", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the texts are written")
    parser.add_argument("--compile", action="store_true", help="with xcrun metal")
    parser.add_argument("--first", type=int, help="only so many of them")
    arguments = parser.parse_args()
    index = write(specialisations()[: arguments.first], arguments.folder)
    print(f"{len(index)} texts in {arguments.folder}; index.txt says what each is")
    if not arguments.compile:
        return 0
    try:
        reports = apple.compile_all(list(index), os.cpu_count() or 1)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = {path.name: name for path, name in index.items()}
    for report in reports:
        print(report)
        for file, messages in report.errors.items():
            print(f"{report.version}: {file}: {names[file]}\n{messages}")
    return int(any(report.errors for report in reports))


if __name__ == "__main__":
    sys.exit(main())

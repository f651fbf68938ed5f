"""What wrong requests get, from mlx-lm's server and from ours.

    python benchmarks/bench_faults.py [--server mlx-lm|mlx-tq]

Sends the requests of ``tests/serving_faults.py`` to a server with the bundled model,
one after the other, and after each asks for a token and for ``/health``. A server that
does not answer any more is started again. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from serving_faults import ACCEPTED, REFUSED  # noqa: E402

MODEL = ROOT / "examples" / "books-20m"
#: Everything that samples is on, so that what is set wrongly is used.
BASE = {
    "temperature": 1,
    "max_tokens": 2,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "xtc_probability": 0.5,
}
COMMANDS = {
    "mlx-lm": ["-m", "mlx_lm", "server", "--decode-concurrency", "8"],
    "mlx-tq": ["-m", "mlx_turboquant", "server", "--kv-bits", "3"],
}


class Server:
    """A server that is started again when it has died."""

    def __init__(self, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = ["--model", str(MODEL), "--port", str(self.port)]
        self._command = [sys.executable, *COMMANDS[name], *options]
        self._start()

    def _start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet)
        while self.ask("/health")[0] != 200:
            time.sleep(0.2)

    def ask(self, path: str, **fields: object) -> tuple[int, str]:
        """Status and text of an answer; 0 if there is none."""
        body = json.dumps(fields).encode() if fields else None
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, body)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def is_well(self) -> bool:
        """Whether it answers the next request."""
        status, _ = self.ask("/v1/completions", prompt="a", max_tokens=1)
        return status == 200 and self.ask("/health")[0] == 200

    def restart(self) -> None:
        """Begin anew."""
        self.close()
        self._start()

    def close(self) -> None:
        """End it; mlx-lm's may not end by itself any more."""
        self._process.kill()
        self._process.wait()


def tried() -> list[dict[str, object]]:
    """What each request has beside the base: what is to be refused first."""
    wrong = [{name: value} for name, of in REFUSED.items() for value, _ in of]
    return [*wrong, *ACCEPTED]


def main() -> None:
    """Ask, and print what came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=[*COMMANDS], action="append")
    names = parser.parse_args().server or [*COMMANDS]
    base = {"prompt": "The sea", **BASE}
    rows = [[json.dumps(fields)] for fields in tried()]
    for name in names:
        server, deaths = Server(name), 0
        for fields, row in zip(tried(), rows, strict=True):
            status, _ = server.ask("/v1/completions", **{**base, **fields})
            lived = server.is_well()
            row.append(f"{status or 'no answer'}{'' if lived else ', and it is dead'}")
            if not lived:
                deaths += 1
                server.restart()
        server.close()
        print(f"{name}: {len(rows)} requests, died of {deaths}", file=sys.stderr)
    print("| request |", " | ".join(names), "|")
    print("|---" * (1 + len(names)), "|", sep="")
    for row in rows:
        print("|", " | ".join(cell.replace("|", "\\|")[:90] for cell in row), "|")


if __name__ == "__main__":
    main()

"""From nothing to a first answer: an empty environment, the built wheel, a chat.

Times in seconds of making a virtual environment, installing the wheel into it (pip,
without its cache: what the network and the index give is in this number), and of a chat
that is asked one thing through a pipe, with the bundled model: the first start, which
also compiles Python's files, and the second. Then the same chat through uvx and pipx,
from empty caches (so the first start installs) and again. The last line is JSON.

    python benchmarks/bench_install.py [--python python3.12] [--extra cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "books-20m"
QUESTION = "It was the best of times, it was the"
CHAT = ("mlx_tq.chat", "--model", MODEL, "--kv-bits", "3", "-m", "32")
#: Words before a command of the wheel that comes next.
RUNNERS = {"uvx": ("uvx", "--from"), "pipx": ("pipx", "run", "--spec")}


def timed(
    *command: str | Path,
    stdin: str = "",
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
) -> tuple[float, str]:
    """Seconds that a command takes, and what it prints."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | (env or {}),
        input=stdin,
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - start, done.stdout


def measure(python: str, extra: str) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv = folder / "venv"
        wheel_s, _ = timed(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--wheel-dir", folder, ROOT),
        )
        (wheel,) = folder.glob("*.whl")
        rows: dict[str, float | str] = {"build_s": wheel_s, "wheel": wheel.name}
        rows["venv_s"], _ = timed(python, "-m", "venv", venv)
        target = f"{wheel}[{extra}]" if extra else str(wheel)
        rows["install_s"], _ = timed(
            *(venv / "bin" / "pip", "install", "--quiet", "--no-cache-dir", target),
            cwd=folder,
        )
        _, listed = timed(venv / "bin" / "pip", "list", "--format", "freeze")
        rows["packages"] = len(listed.split())
        files = (p for p in venv.rglob("*") if p.is_file() and not p.is_symlink())
        rows["installed_mb"] = sum(p.stat().st_size for p in files) / 1e6
        asked = {"stdin": f"{QUESTION}\n/quit\n", "cwd": folder}
        for start in ("first", "second"):
            chat = (venv / "bin" / CHAT[0], *CHAT[1:])
            rows[f"{start}_chat_s"], answer = timed(*chat, **asked)
        rows["answer"] = answer.partition("\n")[2].strip()  # without the path
        tools = folder / "tools"
        timed(python, "-m", "venv", tools)
        timed(tools / "bin" / "pip", "install", "--quiet", "uv", "pipx")
        empty = {"UV_CACHE_DIR": f"{folder}/uv", "PIPX_HOME": f"{folder}/pipx"}
        for name, (program, *words, spec) in RUNNERS.items():
            here = (tools / "bin" / program, *words, "--python", python)
            run = (*here, spec, target, *CHAT)
            for start in ("first", "second"):
                # pipx may have uv do its work, which has a cache: each begins without.
                env = {key: f"{path}-{name}" for key, path in empty.items()}
                rows[f"{name}_{start}_s"], _ = timed(*run, **asked, env=env)
        code = "import sys, mlx.core as m; print(sys.version.split()[0], m.__version__)"
        _, versions = timed(venv / "bin" / "python", "-c", code)
        rows["python"], rows["mlx"] = versions.split()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="Of the environment.")
    extra = "cpu" if sys.platform == "linux" else ""
    parser.add_argument("--extra", default=extra, help="Of the wheel.")
    args = parser.parse_args()
    rows = measure(args.python, args.extra)
    print(
        f"{os.cpu_count()} cores of {platform.machine()} {platform.system()}, "
        f"Python {rows['python']}, MLX {rows['mlx']}\n"
        f"an empty environment  {rows['venv_s']:.1f} s\n"
        f"pip install           {rows['install_s']:.1f} s  "
        f"{rows['packages']} packages, {rows['installed_mb']:.0f} MB\n"
        f"the first chat        {rows['first_chat_s']:.1f} s  start to end, 32 tokens\n"
        f"the second            {rows['second_chat_s']:.1f} s\n"
        f"uvx, first and again  {rows['uvx_first_s']:.1f} and "
        f"{rows['uvx_second_s']:.1f} s  environment, installation and chat\n"
        f"pipx run, the same    {rows['pipx_first_s']:.1f} and "
        f"{rows['pipx_second_s']:.1f} s\n\n{rows['answer']}"
    )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

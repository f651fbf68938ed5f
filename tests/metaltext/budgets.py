"""What attention may cost: the table in ``budgets.json``, and how it is made.

Counted with clang 19, what ``tests/system_packages.sh`` installs first: another version
gives other numbers, so it is told rather than compared. A change that exceeds a budget
either is undone or says so by writing the table anew:

    PYTHONPATH=tests python -m metaltext.budgets

Owns no counting (`counts`).
"""

from __future__ import annotations

import json
from pathlib import Path

from metalsim.build import find_clang

from mlx_turboquant.codecs.kernel_format import ANGLES, PAIRS, POLYNOMIAL, TRELLIS

from .counts import Counted, count
from .specialisations import Specialisation, specialisations

CLANG = 19
TABLE = Path(__file__).with_name("budgets.json")
#: What builds of one version were allowed to differ by, in shares, and in registers.
_SLACK, _REGISTERS = 0.01, 3
#: What a round does without: slow on Apple's GPUs, or a sign of arrays in memory.
NEVER = (
    "integer divisions",
    "64-bit integers",
    "shifts by variables",
    "thread memory",
)
_KINDS = {POLYNOMIAL: "scalar", PAIRS: "pairs", TRELLIS: "trellis", ANGLES: "angles"}

Row = dict[str, float]


def attention() -> dict[str, Specialisation]:
    """Specialisations that have a budget, by label: unmasked steps of fp16 models."""
    found: dict[str, Specialisation] = {}
    for made in specialisations():
        template = dict(made.template)
        if made.kernel.name != "decode_split_kv" or "float16" not in str(template["T"]):
            continue
        if template["CENTER"] and not template["MASKED"]:
            found.setdefault(label(template), made)
    return found


def label(template: dict[str, object]) -> str:
    """What it reads (kind, bits, terms), its dims, and its products of query rows."""
    sides = "/".join(
        f"{_KINDS[int(str(template[f'{side}_KIND']))]}"
        f"{template[f'{side}_BITS']}.{template[f'{side}_TERMS']}"
        for side in "KV"
    )
    rows = template["FMA_ROWS"]
    if rows:
        form = f"{rows} row{'s' * (rows != 1)}"
    else:
        form = f"matrices of {8 * int(str(template['ROW_TILES']))} rows"
    return f"{sides} {template['DK']}x{template['DV']} {form}"


def is_everyday(name: str) -> bool:
    """Whether `make test` counts it: the default codec at the usual head_dims."""
    kinds, dims, _ = name.split(" ", 2)
    return kinds == "scalar3.2/scalar3.2" and dims in ("64x64", "128x128", "256x256")


def row_of(counted: Counted) -> Row:
    """What the table says of a specialisation."""
    return {
        "registers": counted.registers,
        "spilled": counted.spilled,
        "operations": counted.operations.total(),
        "an element": round(counted.per_element, 2),
        **dict(sorted(counted.operations.items())),
    }


def exceeded(row: Row, budget: Row) -> list[str]:
    """What is over the budget, old and new."""
    limits = {
        "registers": budget["registers"] + _REGISTERS,
        "spilled": budget["spilled"] + 4 * _REGISTERS,
        "operations": budget["operations"] * (1 + _SLACK),
    }
    limits |= dict.fromkeys(NEVER, 0)
    return [
        f"{name}: {row[name]:g}, was {budget.get(name, 0):g}"
        for name, limit in limits.items()
        if row.get(name, 0) > limit
    ]


def table() -> dict[str, Row]:
    """The table as it is committed."""
    loaded: dict[str, Row] = json.loads(TABLE.read_text())
    return loaded


def main() -> None:
    """Count everything and write the table."""
    if find_clang()[1] != CLANG:
        raise SystemExit(f"budgets are counted with clang {CLANG}: {find_clang()[0]}")
    rows = {name: row_of(count(made)) for name, made in attention().items()}
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, row in rows.items():
        print(
            f"{name:44} {row['an element']:6.2f} operations an element, "
            f"{row['registers']:3} registers, {row['spilled']:4} bytes over 128"
        )


if __name__ == "__main__":
    main()

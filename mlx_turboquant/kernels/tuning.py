"""`Tuning`: launch sizes and variants of decode attention that move its speed only.

Owns the names, their ranges, and nothing of how they are chosen: what is None is what
`backends.geometry` and `backends.specialize` say for every machine, what is not was
measured on this one (`proof.tuner`). Whether query fragments wait in registers or in
threadgroup memory is none of them: the kernel has them in threadgroup memory only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

#: Names, and the least and most that kernels and launches have room for.
_RANGES = {
    "simdgroups": (1, 8),
    "fma_rows": (0, 4),
    "fill": (0.125, 8.0),
    "few_tokens": (32, 1 << 16),
    "many_tokens": (32, 1 << 16),
    "merge_simdgroups": (1, 16),
}


class Heads(NamedTuple):
    """What a tuning is measured for, besides what kernels are specialised for."""

    #: KV heads, of all rows of a batch.
    kv_heads: int
    #: Query rows of each: query heads to a KV head, times tokens of a step.
    rows: int

    def __str__(self) -> str:
        return f"{self.kv_heads} KV heads of {self.rows} rows"


@dataclass(frozen=True)
class Tuning:
    """What differs from the launches that every machine gets; None does not.

    Attributes:
        simdgroups: To a threadgroup of pass 1, 1 to 8.
        fma_rows: Query rows of a KV head up to which pass 1 takes multiply-adds, 0 to
            4; more take matrix products.
        fill: Splits at most, where 1 is as many as fill the machine once.
        few_tokens: Packed tokens of a split at least, while splits fill less than half
            of that.
        many_tokens: The same, to fill it whole.
        merge_simdgroups: To a threadgroup of pass 2, 1 to 16.

    Raises:
        ValueError: if one is out of range, or no number.
    """

    simdgroups: int | None = None
    fma_rows: int | None = None
    fill: float | None = None
    few_tokens: int | None = None
    many_tokens: int | None = None
    merge_simdgroups: int | None = None

    def __post_init__(self) -> None:
        for name, number in self.changes.items():
            least, most = _RANGES[name]
            kinds = (int, float) if name == "fill" else (int,)
            if type(number) not in kinds or not least <= number <= most:
                raise ValueError(f"{name}={number!r} is not in {least}..{most}")

    @property
    def changes(self) -> dict[str, float]:
        """What is not None, by name."""
        return {name: n for name, n in asdict(self).items() if n is not None}

    def __str__(self) -> str:
        changes = ", ".join(f"{name} {n:g}" for name, n in self.changes.items())
        return changes or "untuned"


#: What every machine gets.
UNTUNED = Tuning()

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

POLYNOMIAL, PAIRS, TRELLIS, ANGLES = range(4)


@dataclass(frozen=True, eq=False)
class KernelFormat:
    kind: int
    bits: int
    terms: int
    params: Any = None
    exact_params: Any = None
    coefficients: tuple[float, ...] = ()

    @property
    def has_table(self) -> bool:
        return self.kind != POLYNOMIAL


@dataclass(frozen=True, eq=False)
class EncodeFormat:
    kernel: str
    template: dict[str, int]
    table: Any
    words: int

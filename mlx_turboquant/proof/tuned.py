"""`Tuned`: what a tuner found, as verdicts keep it.

Owns the record and its words; `tuner` makes it, `backends.proved` goes by it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..kernels.tuning import UNTUNED, Heads, Tuning


@dataclass(frozen=True)
class Tuned:
    """What a tuner found.

    Attributes:
        heads: Of the attention that was timed, one step of one sequence.
        tuning: The launches that are fastest; `UNTUNED` if none gains enough.
        us: By packed tokens, microseconds of a decode attention without and with it,
            taken by turns; empty if nothing is changed.
        tried: How many launches were.
        seconds: How long all took.
        reason: Why it did not try all, what it left out, or why what it found is not
            used; "" if there is nothing to say.
    """

    heads: Heads
    tuning: Tuning = UNTUNED
    us: dict[str, tuple[float, float]] = field(default_factory=dict)
    tried: int = 0
    seconds: float = 0.0
    reason: str = ""

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Tuned:
        """From JSON.

        Raises:
            ValueError, TypeError, KeyError: if it is none.
        """
        kv_heads, rows = fields["heads"]
        us = fields["us"].items()
        return cls(
            Heads(int(kv_heads), int(rows)),
            Tuning(**fields["tuning"]),
            {str(n): (float(base), float(best)) for n, (base, best) in us},
            int(fields["tried"]),
            float(fields["seconds"]),
            str(fields["reason"]),
        )

    @property
    def fields(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        """What is changed, and what it gains."""
        if not self.tuning.changes:
            return "nothing to change"
        gains = ", ".join(
            f"{base / best:.2f}x at {n}" for n, (base, best) in self.us.items()
        )
        return f"{self.tuning} ({gains} tokens)"

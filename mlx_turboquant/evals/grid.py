"""`EvalPlan`: what an evaluation measures, fixed before it starts.

The defaults are the standard grid: some 12 minutes on two CPU cores with the bundled
model. Two runs with equal plans can continue one another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import SpecError
from ..spec import QUALITIES

#: What `evaluate` compares when no caches are given.
SPECS = (
    *(f"auto,quality={name}" for name in QUALITIES),
    *("4", "3", "2"),
)
BASELINES = (
    "fp",
    *(f"affine:{bits}" for bits in (8, 4, 3, 2)),
    "rotated-affine:4",
)
#: Least and most of each number: jobs are listed before the first is done.
_LIMITS = {
    **dict.fromkeys(("windows", "seeds", "depths"), (1, 10_000)),
    **dict.fromkeys(("prefill", "chunk", "scored"), (1, 2**20)),
    **dict.fromkeys(("stepped", "greedy"), (0, 2**20)),
}


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """How much of everything to measure.

    Attributes:
        lengths: Context lengths in tokens at which a window is scored, ascending.
        windows: Stretches of text; each is read once, to the longest length.
        seeds: Rotation seeds, spread over the windows: window i has seed i mod seeds.
        prefill: Tokens read at a time between lengths.
        chunk: Tokens read at a time while scoring in chunks.
        scored: Tokens scored in chunks, up to each length.
        stepped: Tokens scored one by one after them.
        needles: Lengths at which hidden facts are asked for; empty for none.
        depths: Facts hidden in each such text, evenly from front to back.
        greedy: Tokens generated greedily to see where they part; 0 for none.
        layers: Also compress one layer at a time, to see how much each costs.
        long: Tokens of the model's own text that are read behind a prompt, as
            `evals.long` says; 0 for none.
        written: Tokens of them that each cache also writes itself.
        max_kv_size: Tokens that the compared caches keep at most; what they are held to
            keeps all. Not with ``layers``, ``long`` or ``bounds``.
        bounds: Also bound the error of attention, at the first length or else at 1,024
            tokens (`evals.bounds`). With this or ``long`` there may be no lengths.

    Raises:
        SpecError: for a value outside its limits.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    windows: int = 3
    seeds: int = 3
    prefill: int = 512
    chunk: int = 32
    scored: int = 96
    stepped: int = 16
    needles: tuple[int, ...] = (1000, 4000)
    depths: int = 4
    greedy: int = 32
    layers: bool = False
    long: int = 0
    written: int = 1024
    bounds: bool = False
    max_kv_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_kv_size is not None and (self.layers or self.long or self.bounds):
            raise SpecError(
                f"max_kv_size {self.max_kv_size} does not go with layers, long or "
                "bounds; leave one out"
            )
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise SpecError(f"{name} {value} is outside {least}..{most}")
        if any(length < 1 for length in self.needles):
            raise SpecError(f"needles {list(self.needles)} are not all above 0")
        gaps = zip((0, *self.lengths), self.lengths, strict=False)
        if self.long and self.written > self.long:
            raise SpecError(
                f"written {self.written} is more than the {self.long} tokens of long; "
                "lower --written"
            )
        if self.has_no_lengths:
            return
        if not self.lengths:
            raise SpecError(
                "there is no length to score at, and windows, greedy and layers need "
                "one; give --lengths 1024,2048, or leave it out"
            )
        if any(b - a <= self.tail for a, b in gaps):
            raise SpecError(
                f"lengths {list(self.lengths)} must ascend by more than the "
                f"{self.tail} tokens scored at each; leave some out"
            )

    @property
    def has_no_lengths(self) -> bool:
        """Whether nothing is scored at any length of context."""
        return bool(self.long or self.bounds) and not (
            self.lengths or self.greedy or self.layers
        )

    @property
    def tail(self) -> int:
        """Tokens scored at each length."""
        return self.scored + self.stepped

    def state(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in asdict(self).items()
            if k != "max_kv_size" or v is not None  # older results have none
        }

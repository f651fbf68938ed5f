"""TurboQuant with other rules for its scale, and the paper's own.

    research.turboquant-plain   the paper's: the vector's own norm, no search of gains
    research.turboquant-eden    EDEN's unbiased scale on both sides
    research.turboquant-drive   DRIVE's least squares on both sides

Sources: see `scale_rules`.
"""

from __future__ import annotations

from ...rotation import rotation_for
from ...spec import CodecSpec
from ..base import Side
from ..registry import CodecInfo, register_codec
from ..scale_rules import Rule
from ..turboquant import SEARCH_GAINS, TurboQuant, turboquant

#: No search: the gain that the paper's algorithm has.
PLAIN_GAINS = (1.0,)


def _register(variant: str, rule: Rule, gains: tuple[float, ...]) -> None:
    def build(spec: CodecSpec, dim: int, side: Side, seed: int) -> TurboQuant:
        rotation = rotation_for(dim, seed)
        return turboquant(spec, dim, int(spec.bits), rotation, rule, gains)

    widths = tuple(range(1, 9))
    register_codec(CodecInfo(f"research.turboquant-{variant}", widths, build))


_register("plain", "plain", PLAIN_GAINS)
_register("eden", "unbiased", SEARCH_GAINS)
_register("drive", "least-squares", SEARCH_GAINS)

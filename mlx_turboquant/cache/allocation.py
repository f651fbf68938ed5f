"""`Allocation`: how many bits each layer's keys and values get, chosen from a text.

Owns the choice, made once, when every layer has been calibrated on the first page (or
can wait no longer). Layers keep their tokens as they are until then.

With D(b) the relative error of b bits, quantizing a layer's keys adds D(b) * A to the
variance of its logits, where A is the variance that an error as large as the keys
themselves would add (`Calibration.logit_variance`), and so about D(b) * A / 2 to the KL
divergence of its attention. Errors of the values move the output as much as a logit
variance of D(b) would: in both cases every token's share of the output is off by its
attention weight times the root of that. So the predicted cost of a text is

    sum over layers of (D(b_keys) * A + D(b_values)) / 2

and each step gives one more bit to the side where it takes most off per bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..polynomial import computable
from ..spec import CacheSpec, CodecSpec

#: Widths that are given out; few, because a GPU compiles a kernel for each pair.
WIDTHS = (2, 3, 4, 5, 6, 8)
#: Predicted cost per layer that each quality may have; see docs/design.md.
TARGETS = {"lossless": 0.0005, "balanced": 0.01, "small": 0.04}
#: Taken for layers whose queries were never seen.
_UNSEEN_VARIANCE = 4.0


class Allocation:
    """Shared by the layers of one text; `choose` once, then `spec_of`.

    Args:
        spec: With a ``budget`` or a ``quality``.
        layers: How many share it.
    """

    def __init__(self, spec: CacheSpec, layers: int) -> None:
        self.spec = spec
        self._variances: list[float | None] = [None] * layers
        self._chosen: list[tuple[int, int]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Allocation:
        """Itself: layers are copied one by one, and still belong together."""
        return self

    def report(self, layer: int, variance: float | None) -> None:
        """A layer's A, None if its queries were not seen."""
        self._variances[layer] = _UNSEEN_VARIANCE if variance is None else variance

    @property
    def ready(self) -> bool:
        """Whether every layer has reported, or bits are chosen already."""
        return self._chosen is not None or None not in self._variances

    def spec_of(self, layer: int, dims: tuple[int, int]) -> CacheSpec:
        """What one layer stores: the spec without its budget or quality."""
        if self._chosen is None:
            known = [v for v in self._variances if v is not None]
            usual = sorted(known)[len(known) // 2] if known else _UNSEEN_VARIANCE
            variances = [usual if v is None else v for v in self._variances]
            self._chosen = choose(variances, dims, self.spec)
        k_bits, v_bits = self._chosen[layer]
        return replace(
            self.spec,
            keys=CodecSpec.of(self.spec.keys.name, k_bits),
            values=CodecSpec.of(self.spec.values.name, v_bits),
            budget=None,
            quality=None,
        )


@dataclass(frozen=True)
class Seat:
    """One layer's place in an allocation."""

    allocation: Allocation
    layer: int


def choose(
    variances: Sequence[float], dims: tuple[int, int], spec: CacheSpec
) -> list[tuple[int, int]]:
    """Bits of (keys, values) per layer.

    Args:
        variances: A of each layer.
        dims: Elements of a key and of a value.
        spec: Its ``budget`` is met on average and not exceeded; else its ``quality``
            bounds the mean predicted cost of a layer.
    """
    weights = [w for variance in variances for w in (variance, 1.0)]
    sizes = [dim for _ in variances for dim in dims]
    ladders = [[computable(dim, b).mse for b in WIDTHS] for dim in dims] * len(
        variances
    )
    rungs = [0] * len(weights)

    def cost() -> float:
        parts = zip(weights, ladders, rungs, strict=True)
        return sum(w * ladder[rung] for w, ladder, rung in parts) / 2 / len(variances)

    def bits() -> float:
        used = sum(WIDTHS[r] * size for r, size in zip(rungs, sizes, strict=True))
        return used / sum(sizes)

    def gain(side: int) -> float:
        rung = rungs[side]
        if rung + 1 == len(WIDTHS):
            return -1.0
        saved = weights[side] * (ladders[side][rung] - ladders[side][rung + 1])
        return saved / (WIDTHS[rung + 1] - WIDTHS[rung]) / sizes[side]

    blocked: set[int] = set()
    while len(blocked) < len(rungs):
        if spec.quality is not None and cost() <= TARGETS[spec.quality]:
            break
        side = max((s for s in range(len(rungs)) if s not in blocked), key=gain)
        if gain(side) < 0:
            break
        rungs[side] += 1
        if spec.budget is not None and bits() > spec.budget + 1e-9:
            rungs[side] -= 1
            blocked.add(side)
    widths = [WIDTHS[rung] for rung in rungs]
    return list(zip(widths[::2], widths[1::2], strict=True))

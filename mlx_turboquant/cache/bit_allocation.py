"""`BitAllocator`: how many bits each layer's keys and values get, chosen from a text.

Owns the choice, made once, when every layer has been calibrated on the first page (or
can wait no longer). Layers keep their tokens as they are until then.

With D(b) the relative error of b bits, codes for a layer's values move the attention's
output by D(b) * R of its square, where R is what an error as large as the values would
do (`Calibration.reach`): little where attention is spread or near, for near tokens are
no codes. An error of the keys adds D(b) * A to the variance of a logit, A being what
one as large as the keys would add (`Calibration.logit_variance`), and so changes every
token's share of the output by the root of that, as an error of its value would. So the
predicted cost of a text is

    mean over layers of R * (D(b_keys) * A + D(b_values)) / 2

about the KL divergence of the bundled model's output (docs/design.md), and each step
gives one more bit to the side where it takes most off per bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..codecs import codec_info
from ..spec import CacheSpec, CodecSpec

#: Predicted cost that each quality may have; "lossless" is what mlx-lm's 8 bits cost.
TARGETS = {"lossless": 0.00004, "balanced": 0.0003, "small": 0.0015}
#: Taken for (R, A) where no layer's queries were seen.
_UNSEEN = (0.05, 4.0)


class BitAllocator:
    """Shared by the layers of one text; `choose` once, then `spec_of`.

    Args:
        spec: With a ``budget`` or a ``quality``.
        layers: How many share it.
    """

    def __init__(self, spec: CacheSpec, layers: int) -> None:
        self.spec = spec
        self._readings: list[tuple[float, float] | None] = [None] * layers
        self._reported: set[int] = set()
        self._chosen: list[tuple[CodecSpec, CodecSpec]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BitAllocator:
        """Itself: layers are copied one by one, and still belong together."""
        return self

    def report(self, layer: int, reach: float | None, variance: float | None) -> None:
        """A layer's R and A; None if its queries were not seen."""
        self._reported.add(layer)
        if reach is not None and variance is not None:
            self._readings[layer] = (reach, variance)

    @property
    def ready(self) -> bool:
        """Whether every layer has reported, or bits are chosen already."""
        return self._chosen is not None or len(self._reported) == len(self._readings)

    def spec_of(self, layer: int, dims: tuple[int, int]) -> CacheSpec:
        """What one layer stores: the spec without its budget or quality."""
        if self._chosen is None:
            known = [reading for reading in self._readings if reading is not None]
            usual = sorted(known)[len(known) // 2] if known else _UNSEEN
            readings = [reading or usual for reading in self._readings]
            self._chosen = choose(readings, dims, self.spec)
        keys, values = self._chosen[layer]
        return replace(self.spec, keys=keys, values=values, budget=None, quality=None)


@dataclass(frozen=True)
class LayerSlot:
    """One layer's place in an allocation."""

    allocation: BitAllocator
    layer: int


def ladder(codec: str, dim: int) -> Sequence[tuple[CodecSpec, float]]:
    """What a side can have, the coarsest first, with its relative error."""
    choices = codec_info(codec).choices
    assert choices is not None, "an adaptive spec has adaptive codecs"
    return choices(dim)


def choose(
    readings: Sequence[tuple[float, float]], dims: tuple[int, int], spec: CacheSpec
) -> list[tuple[CodecSpec, CodecSpec]]:
    """Codecs of (keys, values) per layer.

    Args:
        readings: (R, A) of every layer.
        dims: Elements of a key and of a value.
        spec: Its ``budget`` is met on average and not exceeded; else its ``quality``
            bounds the predicted cost.
    """
    count = len(readings)
    weights = [w for reach, variance in readings for w in (reach * variance, reach)]
    sizes = [*dims] * count
    names = (spec.keys.name, spec.values.name)
    ladders = [ladder(name, dim) for name, dim in zip(names, dims, strict=True)] * count
    rungs = [0] * len(weights)

    def cost() -> float:
        parts = zip(weights, ladders, rungs, strict=True)
        return sum(w * steps[rung][1] for w, steps, rung in parts) / 2 / count

    def bits() -> float:
        parts = zip(sizes, ladders, rungs, strict=True)
        used = sum(size * steps[rung][0].bits for size, steps, rung in parts)
        return used / sum(sizes)

    def gain(side: int) -> float:
        steps, rung = ladders[side], rungs[side]
        if rung + 1 == len(steps):
            return -1.0
        (low, error), (high, less) = steps[rung : rung + 2]
        return weights[side] * (error - less) / (high.bits - low.bits) / sizes[side]

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
    chosen = [s[rung][0] for s, rung in zip(ladders, rungs, strict=True)]
    return list(zip(chosen[::2], chosen[1::2], strict=True))

"""`BitAllocator`: how many bits each layer's keys and values get, chosen from a text.

The choice is made once, when every layer has been calibrated on the first page (or can
wait no longer); layers keep their tokens as they are until then. It minimises the
predicted cost of the text,

    mean over layers of R * (D(b_keys) * A + D(b_values)) / 2

which is about the KL divergence of the bundled model's output (docs/design.md), with

- D(b), the relative squared error of codes of b bits;
- R, the relative squared error of the attention's output if its values were wrong by as
  much as they are long (`Calibration.far_value_sensitivity`): little where attention is
  spread or near, for near tokens are no codes;
- A, the variance that keys wrong by as much would add to a logit
  (`Calibration.logit_variance`). It changes every token's share of the output by its
  root, as an error of the token's value would.

Each step gives one more bit to the side where it takes most off the cost per bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..codecs import codec_info
from ..spec import CacheSpec, CodecSpec

#: Predicted cost that each quality may have; "lossless" is what mlx-lm's 8 bits cost.
TARGETS = {"lossless": 0.000037, "balanced": 0.0003, "small": 0.0015}
#: (R, A) where no layer's queries were seen.
_UNSEEN = (0.05, 4.0)
#: Mean bits may be above the budget by this much, which is rounding.
_BUDGET_SLACK = 1e-9

#: (KV heads, elements of a key, elements of a value).
Shape = tuple[int, int, int]


class BitAllocator:
    """The bits of the layers of one text, chosen together and once.

    Args:
        spec: With a ``budget`` or a ``quality``.
        shapes: (KV heads, key dim, value dim) of each layer that shares it, as its
            `CacheEntry` has it; None if nobody knows yet: then that of the layer that
            asks first.

    The choice is made once: a cache that is trimmed to nothing and gets another text
    keeps it.
    """

    def __init__(self, spec: CacheSpec, shapes: Sequence[Shape | None]) -> None:
        self.spec = spec
        self._shapes = list(shapes)
        self._sensitivities: list[tuple[float, float] | None] = [None] * len(shapes)
        self._reported: set[int] = set()
        self._codecs: list[tuple[CodecSpec, CodecSpec]] | None = None
        self._latest_fork: weakref.ref[BitAllocator] | None = None
        self._forked: set[int] = set()  # layers that were forked into it

    def fork(self, layer: int) -> BitAllocator:
        """What a fork of a layer's cache shares with those of the other layers.

        They are forked one by one: the first makes it, the others join, and a layer
        that asks again begins another.
        """
        fork = None if self._latest_fork is None else self._latest_fork()
        if fork is None or layer in fork._forked:
            fork = BitAllocator(self.spec, self._shapes)
            fork._sensitivities = list(self._sensitivities)
            fork._reported, fork._codecs = set(self._reported), self._codecs
            self._latest_fork = weakref.ref(fork)
        fork._forked.add(layer)
        return fork

    def add_sensitivity(
        self, layer: int, far_value: float | None, logit_variance: float | None
    ) -> None:
        """Take in a layer's R and A; both None if its queries were not seen."""
        self._reported.add(layer)
        if far_value is not None and logit_variance is not None:
            self._sensitivities[layer] = (far_value, logit_variance)

    @property
    def complete(self) -> bool:
        """Whether every layer has reported, or bits are chosen already."""
        everyone = len(self._reported) == len(self._sensitivities)
        return everyone or self._codecs is not None

    def spec_for(self, layer: int, dims: tuple[int, int]) -> CacheSpec:
        """What one layer stores: the spec without its budget or quality.

        Layers that have not reported count as the median of those that have.

        Args:
            layer: Its index.
            dims: Elements of a key and of a value.
        """
        if self._codecs is None:
            known = sorted(s for s in self._sensitivities if s is not None)
            usual = known[len(known) // 2] if known else _UNSEEN
            sensitivities = [s or usual for s in self._sensitivities]
            shapes = [shape or (1, *dims) for shape in self._shapes]
            self._codecs = choose(sensitivities, shapes, self.spec)
        keys, values = self._codecs[layer]
        return replace(self.spec, keys=keys, values=values, budget=None, quality=None)


@dataclass(frozen=True)
class LayerSlot:
    """One layer's place in an allocation.

    Attributes:
        allocator: Shared by all layers of the text.
        layer: Its index among them.
    """

    allocator: BitAllocator
    layer: int

    def fork(self) -> LayerSlot:
        """The layer's place in a fork."""
        return LayerSlot(self.allocator.fork(self.layer), self.layer)


def candidates(codec: str, dim: int) -> Sequence[tuple[CodecSpec, float]]:
    """What a side can store, the coarsest first, with its relative squared error."""
    choices = codec_info(codec).choices
    assert choices is not None, "an adaptive spec has adaptive codecs"
    return choices(dim)


def choose(
    sensitivities: Sequence[tuple[float, float]],
    shapes: Sequence[Shape],
    spec: CacheSpec,
) -> list[tuple[CodecSpec, CodecSpec]]:
    """Codecs of (keys, values) per layer.

    Args:
        sensitivities: (R, A) of every layer.
        shapes: (KV heads, key dim, value dim) of every layer.
        spec: Its ``budget`` is met on average and not exceeded; else its ``quality``
            bounds the predicted cost.
    """
    # Sides in one row: keys and values of layer 0, of layer 1, ...
    layers = len(sensitivities)
    weights = [w for r, a in sensitivities for w in (r * a, r)]
    dims = [dim for _, k_dim, v_dim in shapes for dim in (k_dim, v_dim)]
    sizes = [heads * dim for heads, *own in shapes for dim in own]
    names = (spec.keys.name, spec.values.name) * layers
    steps = [candidates(name, dim) for name, dim in zip(names, dims, strict=True)]
    levels = [0] * len(weights)

    def cost() -> float:
        parts = zip(weights, steps, levels, strict=True)
        return sum(w * step[level][1] for w, step, level in parts) / 2 / layers

    def mean_bits() -> float:
        parts = zip(sizes, steps, levels, strict=True)
        used = sum(size * step[level][0].bits for size, step, level in parts)
        return used / sum(sizes)

    def gain(side: int) -> float:
        """Cost that the next level takes off per bit; negative if there is none."""
        level = levels[side]
        if level + 1 == len(steps[side]):
            return -1.0
        (low, error), (high, smaller_error) = steps[side][level : level + 2]
        bits = (high.bits - low.bits) * sizes[side]
        return weights[side] * (error - smaller_error) / bits

    exhausted: set[int] = set()  # sides whose next level the budget cannot pay
    while len(exhausted) < len(levels):
        if spec.quality is not None and cost() <= TARGETS[spec.quality]:
            break
        side = max((s for s in range(len(levels)) if s not in exhausted), key=gain)
        if gain(side) < 0:
            break
        levels[side] += 1
        if spec.budget is not None and mean_bits() > spec.budget + _BUDGET_SLACK:
            levels[side] -= 1
            exhausted.add(side)
    codecs = [step[level][0] for step, level in zip(steps, levels, strict=True)]
    return list(zip(codecs[::2], codecs[1::2], strict=True))

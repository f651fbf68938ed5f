"""Which spec each layer gets: one for all, or a list with one for each.

Owns what users may give in place of a spec. Making caches of them is `mlx_lm`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..cache import BitAllocator
from ..errors import SpecError
from ..spec import CacheSpec

#: What users may give: one for all layers, or one for each.
Specs = CacheSpec | str | float | Sequence[CacheSpec | str | float]
Parsed = CacheSpec | list[CacheSpec]


def parsed(spec: Specs) -> Parsed:
    """A spec, or a list of them, read.

    Raises:
        SpecError: if one cannot be read, or the list is empty.
    """
    if isinstance(spec, str | CacheSpec) or not isinstance(spec, Sequence):
        return CacheSpec.parse(spec)
    if not spec:
        raise SpecError("an empty list of specs; give one for each layer, or one spec")
    return [CacheSpec.parse(one) for one in spec]


def of_layers(spec: Parsed, count: int) -> tuple[list[CacheSpec], BitAllocator | None]:
    """A spec for each of ``count`` layers, and what they choose their bits by.

    Raises:
        SpecError: if there are more or fewer specs than layers.
    """
    if isinstance(spec, CacheSpec):
        return [spec] * count, BitAllocator(spec, count) if spec.adaptive else None
    if len(spec) != count:
        raise SpecError(f"{len(spec)} specs do not fit {count} layers; give each one")
    return spec, None

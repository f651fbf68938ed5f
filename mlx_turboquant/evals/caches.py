"""The caches that are compared: ours by spec, mlx-lm's, and baselines.

A name is ``fp``, ``affine:B`` (mlx-lm's
``--kv-bits B``: groups of 64, two scales each), ``rotated-affine:B`` (the same after a
random rotation), or a `CacheSpec`'s text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..cache import TurboQuantCache
from ..errors import SpecError
from ..integrations.factory import make_prompt_cache
from ..integrations.stock import StockKVCache, replace_plain, stock_caches
from ..rotation import rotation_for
from ..spec import CacheSpec

GROUP = 64
_PLAIN_BITS = 16  # of an element in the model's dtype, also where a CPU runs float32
CacheFactory = Callable[[], list[Any]]


class AffineCache(StockKVCache):  # type: ignore[misc]
    """mlx-lm's `QuantizedKVCache`, dequantized at once: the same values, read faster.

    Args:
        bits: 2..8.
        rotated: Rotate before quantizing, and back.
    """

    def __init__(self, bits: int, rotated: bool = False) -> None:
        super().__init__()
        self.code_bits, self.rotated = bits, rotated  # mlx-lm looks at ``bits``

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append what quantization leaves of keys and values (B, H, N, D)."""
        return super().update_and_fetch(self._lossy(keys), self._lossy(values))

    @property
    def nbytes(self) -> int:
        """Bytes that mlx-lm's cache would hold instead, capacity included."""
        elements: int = sum(a.size for a in (self.keys, self.values) if a is not None)
        return round(elements * (self.code_bits + 2 * _PLAIN_BITS / GROUP) / 8)

    def _lossy(self, x: mx.array) -> mx.array:
        rotation = rotation_for(x.shape[3], 0, None if self.rotated else "identity")
        x_rot = rotation.forward(x).astype(x.dtype)
        packed = mx.quantize(x_rot, group_size=GROUP, bits=self.code_bits)
        decoded_rot = mx.dequantize(*packed, group_size=GROUP, bits=self.code_bits)
        return rotation.inverse(decoded_rot).astype(x.dtype)


def cache_factory(
    name: str, model: nn.Module, seed: int = 0, max_kv_size: int | None = None
) -> CacheFactory:
    """What makes the prompt cache called ``name`` for a model.

    Args:
        name: See the module's docstring.
        model: A model of mlx-lm's.
        seed: Of the rotation of a spec that names none.
        max_kv_size: Tokens to keep at most.

    Raises:
        SpecError: for a name that cannot be read.
        UnsupportedModelError: if the model cannot take it.
    """
    kind, _, bits = name.partition(":")
    if name == "fp":
        return lambda: stock_caches(model, max_kv_size)
    if kind in ("affine", "rotated-affine"):
        if bits not in ("2", "3", "4", "5", "6", "8"):
            raise SpecError(f"{name!r} is unknown; affine bits are 2, 3, 4, 5, 6 or 8")
        if max_kv_size is not None:
            raise SpecError(f"{name} keeps all tokens; leave it or max_kv_size out")
        return lambda: replace_plain(
            model, lambda: AffineCache(int(bits), kind == "rotated-affine")
        )
    spec = CacheSpec.parse(name)
    if "seed=" not in name:
        spec = replace(spec, seed=seed)
    return lambda: make_prompt_cache(model, spec, max_kv_size)


def uses_seed(name: str) -> bool:
    """Whether `cache_factory` draws a rotation for it."""
    return name != "fp" and "affine" not in name and "seed=" not in name


def stored_bits(cache: list[Any]) -> tuple[float, int]:
    """(bits stored, elements they stand for) of a whole prompt cache.

    Codes, scales, means, gains, windows; spare capacity is left out everywhere, and
    what is kept in the model's dtype counts 16 bits an element.
    """
    bits, elements = 0.0, 0
    for layer in cache:
        if isinstance(layer, TurboQuantCache):
            elements += layer.elements
            for name, array in layer.state.items():
                if name != "header":
                    is_plain = name.partition(":")[0] in ("sink", "recent")
                    width = _PLAIN_BITS if is_plain else 8 * array.dtype.size
                    bits += array.size * width
            continue
        arrays = (getattr(layer, "keys", None), getattr(layer, "values", None))
        count = sum(a[:, :, : layer.offset].size for a in arrays if a is not None)
        per_element: float = _PLAIN_BITS
        if isinstance(layer, AffineCache):
            per_element = layer.code_bits + 2 * _PLAIN_BITS / GROUP
        bits += per_element * count
        elements += count
    return bits, elements

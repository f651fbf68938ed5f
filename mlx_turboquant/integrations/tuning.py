"""What ``mlx_tq.doctor --tune`` tunes for: a model's attention, or common models'.

Reads a model's config only. How kernels are tuned is ``proof/``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.utils import load_config

from ..backends import proved
from ..backends.gpu import Gpu
from ..cache.quantizers import quantizers_of
from ..errors import SpecError, UnsupportedModelError
from ..kernels.tuning import Heads
from ..proof.store import Verdict
from ..spec import CacheSpec
from .footprint import folder_of, footprint


@dataclass(frozen=True)
class Kind:
    """Layers that one tuning serves.

    Attributes:
        dims: Elements of a key and of a value.
        dtype: The model's, ``"bfloat16"``.
        heads: Of a step of one token.
    """

    dims: tuple[int, int]
    dtype: str
    heads: Heads

    def __str__(self) -> str:
        return f"head_dim {self.dims[0]}/{self.dims[1]}, {self.dtype}, {self.heads}"


#: Of Llama 3, Qwen 3 and Mistral at 8B and near it, and of Llama-3.2-1B.
COMMON = (
    Kind((128, 128), "bfloat16", Heads(8, 4)),
    Kind((64, 64), "bfloat16", Heads(8, 4)),
)


def kinds_of(model: str) -> list[Kind]:
    """The kinds of a model's layers whose codes attention reads.

    Args:
        model: A folder or a hub id, of which ``config.json`` is read.

    Raises:
        UnsupportedModelError: if there is no such config, or none of its layers is.
    """
    shapes = {
        entry.shape
        for entry in footprint(model).layers
        if entry.shape is not None and entry.decision == "handles"
    }
    config = load_config(folder_of(model))
    config = {**config, **(config.get("text_config") or {})}
    heads = config.get("num_attention_heads")
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    kinds = [
        Kind((k_dim, v_dim), str(dtype), Heads(kv_heads, heads // kv_heads))
        for kv_heads, k_dim, v_dim in sorted(shapes)
        if isinstance(heads, int)
    ]
    if not kinds:
        raise UnsupportedModelError(
            f"attention of {model!r} does not read codes, or its config has no "
            "num_attention_heads",
            "tune for common shapes, without --model",
        )
    return kinds


def tune(
    backend: Gpu, spec: CacheSpec, kinds: list[Kind]
) -> Iterator[tuple[Kind, Verdict | None]]:
    """Tune for each kind, in a process of its own.

    Args:
        backend: This machine's kernels.
        spec: What caches store.
        kinds: Of which layers.

    Raises:
        SpecError: if bits are chosen from the text, or no kernel reads such codes.
    """
    if spec.adaptive:
        raise SpecError(
            f"the bits of {spec} are chosen from the text; tune for those it may "
            "choose, such as 3 or 4"
        )
    for kind in kinds:
        dtype: mx.Dtype = getattr(mx, kind.dtype)
        sides = quantizers_of(spec, kind.dims, dtype)
        refusal = backend.refuse(*sides)
        if refusal is not None:
            raise SpecError(f"{spec} cannot be tuned: {refusal}; try another --kv-bits")
        yield kind, proved.tune(backend, *sides, dtype, kind.heads)

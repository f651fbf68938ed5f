"""What mlx-vlm's models are to us: their language model, its attention, its caches.

Owns all that the package knows of mlx-vlm's insides. mlx-vlm has caches, masks and an
attention function of its own, none of which is mlx-lm's, and it keeps on a model where
its images put the positions. It is never imported here: where none of its modules is
loaded there is no model of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_PACKAGE = "mlx_vlm"
_BASE = "mlx_vlm.models.base"
_CACHES = "mlx_vlm.models.cache"


def is_vision_model(model: Any) -> bool:
    """Whether mlx-vlm made this model, or this language model of one."""
    kinds = type(model).__mro__
    return any(kind.__module__.partition(".")[0] == _PACKAGE for kind in kinds)


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model that is given caches: mlx-vlm's ``language_model``.

    Args:
        model: Any model of mlx-vlm's or mlx-lm's; of the latter, the model itself.
    """
    inner = getattr(model, "language_model", None)
    return inner if is_vision_model(model) and inner is not None else model


def attention() -> Callable[..., Any] | None:
    """mlx-vlm's ``scaled_dot_product_attention``, or None if it is not loaded."""
    base = sys.modules.get(_BASE)
    return None if base is None else base.scaled_dot_product_attention


def cache_module() -> ModuleType | None:
    """The module of mlx-vlm's caches, or None if it is not loaded."""
    return sys.modules.get(_CACHES)


def call(model: nn.Module, ids: mx.array, caches: Any) -> Any:
    """What a model makes of text, called as the loop that is made for it calls it.

    mlx-vlm's loop embeds a prompt first, which is also where some models note the
    positions of its tokens, and then gives its language model single tokens.

    Args:
        model: Any model of mlx-vlm's or mlx-lm's.
        ids: Token ids (1, N).
        caches: Its prompt cache.
    """
    inner = language_model(model)
    if inner is model or ids.shape[1] == 1:
        return inner(ids, cache=caches)
    features = model.get_input_embeddings(ids, None, mask=None).to_dict()
    given = {name: value for name, value in features.items() if value is not None}
    return inner(ids, cache=caches, **given)


@contextmanager
def kept_positions(model: nn.Module) -> Iterator[None]:
    """Leave a model as it was before some tokens were tried on it.

    A language model of mlx-vlm's writes down where the latest prompt's images put its
    tokens (M-RoPE), and reads that at the next decode step.

    Args:
        model: Any model of mlx-vlm's or mlx-lm's; the latter keep nothing.
    """
    parts = {id(part): part for part in (model, language_model(model))}
    held = [
        (part, dict(part), dict(vars(part)))
        for part in parts.values()
        if is_vision_model(part)
    ]
    try:
        yield
    finally:
        for part, arrays, rest in held:
            part.clear()
            dict.update(part, arrays)
            vars(part).clear()
            vars(part).update(rest)

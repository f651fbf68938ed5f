"""Speculative decoding: two models' caches in one argument, and when it cannot work.

The loop is mlx-lm's.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..errors import UnsupportedModelError


class PairedCaches(list[Any]):
    """``prompt_cache=`` for mlx-lm's ``draft_model=``, split where the target's end.

    mlx-lm splits at the target's number of layers, which is not its number of caches
    where layers share them or have several.

    Args:
        target: The model's caches.
        draft: The draft model's.
    """

    def __init__(self, target: list[Any], draft: list[Any]) -> None:
        super().__init__([*target, *draft])
        self.target, self.draft = target, draft

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.target if index.start is None else self.draft
        return super().__getitem__(index)


def check_rewinds(caches: list[Any], owner: str, tokens: int | None = None) -> None:
    """Make sure that rejected drafts can be taken back.

    Args:
        caches: The caches of one model, still empty or just loaded.
        owner: Whose they are, for the error.
        tokens: How many prompt and answer have; None if there is no telling.

    Raises:
        UnsupportedModelError: if a cache cannot forget its last tokens, or will have
            forgotten its first ones before ``tokens`` are there.
    """
    for cache in caches:
        if not cache.is_trimmable():
            raise UnsupportedModelError(
                f"the {owner} has a {type(cache).__name__}, which cannot take back "
                "rejected tokens",
                "leave --draft-model out",
            )
        window = getattr(cache, "max_size", None)
        if window is not None and (tokens is None or tokens > window):
            text = "a text of any length" if tokens is None else f"{tokens} tokens"
            raise UnsupportedModelError(
                f"the {owner} has windows of {window} tokens, which cannot take back "
                f"what rejected tokens pushed out; that is less than {text}",
                "leave --draft-model out, or lower --max-tokens",
            )


def check_split(model: nn.Module, caches: list[Any]) -> None:
    """Make sure that mlx-lm's server can tell these caches from the draft model's.

    Raises:
        UnsupportedModelError: if there are more or fewer than layers.
    """
    if len(caches) != len(model.layers):
        raise UnsupportedModelError(
            f"the model has {len(caches)} caches for {len(model.layers)} layers, "
            "which mlx-lm's server cannot tell from the draft model's",
            "serve it without --draft-model",
        )

"""How batches begin: as mlx-lm asks a cache for one, and as mlx-vlm does.

Owns no more than that; importing it puts both on `TurboQuantCache`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ..errors import UnsupportedError
from .batch import BatchTurboQuantCache
from .layer import TurboQuantCache


def _to_batch(
    cache: TurboQuantCache, left_padding: Sequence[int]
) -> BatchTurboQuantCache:
    """A batch of empty rows like this empty cache, as mlx-vlm makes its batches.

    Args:
        cache: What each row stores.
        left_padding: Tokens to skip in each row first.

    Raises:
        UnsupportedError: if the bits of layers are chosen from a text.
    """
    if cache.spec.adaptive:
        raise UnsupportedError(
            f"the bits of {cache.spec} are chosen from one text, mlx-vlm's batches are "
            "of several",
            "give fixed bits, such as k4v3, or one prompt at a time",
        )
    batch = BatchTurboQuantCache([copy.deepcopy(cache) for _ in left_padding])
    batch.prepare(left_padding=left_padding)
    return batch


TurboQuantCache.merge = BatchTurboQuantCache.merge
TurboQuantCache.to_batch = _to_batch

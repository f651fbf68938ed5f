"""`fingerprint`: what a text's codes depend on besides its tokens.

Two models, specs or versions whose codes differ have different ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cache import TurboQuantCache
from ..cache.state import FORMAT_VERSION
from ..conversations.records import bytes_of
from ..version import __version__
from .stock import labelled_leaves

#: Elements of each weight that are looked at.
_SAMPLES = 16


def fingerprint(networks: Sequence[nn.Module], caches: Sequence[Any]) -> bytes:
    """What else a text's codes depend on: models, specs, versions.

    Args:
        networks: A model, or it and its draft model. Of each weight a few elements
            count, so that it costs no reading of all.
        caches: Empty caches of theirs.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{__version__} {FORMAT_VERSION}".encode())
    for network in networks:
        digest.update(repr(getattr(network, "args", None)).encode())
        flat: list[tuple[str, mx.array]] = tree_flatten(network.parameters())  # type: ignore[assignment]
        samples = [
            weight.reshape(-1)[:: max(1, weight.size // _SAMPLES)] for _, weight in flat
        ]
        mx.eval(samples)
        for (name, weight), some in zip(flat, samples, strict=True):
            digest.update(f"{name} {weight.dtype} {weight.shape}".encode())
            digest.update(bytes_of(some).tobytes())
    for label, leaf in labelled_leaves(caches):
        spec = leaf.spec.full if isinstance(leaf, TurboQuantCache) else ""
        size = getattr(leaf, "max_size", None)
        digest.update(f"{label} {type(leaf).__name__} {spec} {size}".encode())
    return digest.digest()

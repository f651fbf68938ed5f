"""Proofs of kernels, begun when caches are made and waited for by commands.

What a proof is, and when it is needed, is `backends.select`'s and ``proof/``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..backends import proved, select
from ..cache import TurboQuantCache
from ..cache.quantizers import quantizers_of
from ..entries import CacheEntry
from ..spec import CacheSpec
from .stock import labelled_leaves

_MODEL_DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def begin(
    model: nn.Module, caches: Iterable[Any], entries: Sequence[CacheEntry]
) -> None:
    """Begin what the caches of a model will need, while its prompt is still to come.

    Bits that a text chooses are not known yet: their kernels are proved later.

    Args:
        model: The model.
        caches: Its prompt cache.
        entries: A record for each leaf of it.
    """
    if not select.awaits_proof():
        return
    dtype = _dtype_of(model)
    leaves = (leaf for _, leaf in labelled_leaves(caches))
    asked: set[tuple[CacheSpec, int, int]] = set()
    for leaf, entry in zip(leaves, entries, strict=True):
        if isinstance(leaf, TurboQuantCache) and entry.shape is not None:
            _, k_dim, v_dim = entry.shape
            asked.add((leaf.spec, k_dim, v_dim))
    for spec, k_dim, v_dim in asked:
        if not spec.adaptive:
            select.resolve(*quantizers_of(spec, (k_dim, v_dim), dtype), dtype)


def wait(
    say: Callable[[str], None], show: Callable[[str], None] = lambda line: None
) -> None:
    """Until no proof is under way; says so in a line before and a line behind.

    Args:
        say: Takes a line.
        show: Takes one that the next replaces, some times a second.
    """
    ledger = proved.this_ledger()
    if not ledger.is_busy:
        return
    say("Checking the kernels on this machine before their first use, once...")

    def glance() -> None:
        subject, passed, checks = ledger.progress
        if checks:
            show(f"{subject}: check {passed} of {checks}")

    for verdict in ledger.wait(glance):
        if verdict.is_ok:
            say(f"{verdict.subject}: ok, {verdict.checks} checks, {verdict.seconds} s")
        else:
            say(f"{verdict.subject}: not used ({verdict.status}): {verdict.reason}")


def _dtype_of(model: nn.Module) -> mx.Dtype:
    """What a model computes in: the dtype of its first weights that are not packed."""
    weights: Any = tree_flatten(model.parameters())
    dtypes = (value.dtype for _, value in weights)
    return next((d for d in dtypes if d in _MODEL_DTYPES), mx.float16)

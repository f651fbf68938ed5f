"""Caches: one layer of one sequence, or of a batch; and bits chosen over layers."""

from . import beginnings as beginnings
from .batch import BatchTurboQuantCache
from .bit_allocation import BitAllocator, LayerSlot
from .layer import TurboQuantCache
from .scored import ScoredTurboQuantCache
from .sliding import RotatingTurboQuantCache, min_window

__all__ = [
    "BatchTurboQuantCache",
    "BitAllocator",
    "LayerSlot",
    "RotatingTurboQuantCache",
    "ScoredTurboQuantCache",
    "TurboQuantCache",
    "min_window",
]

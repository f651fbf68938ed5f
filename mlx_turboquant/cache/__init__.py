"""Caches: one layer of one sequence, or of a batch; and bits chosen over layers."""

from .allocation import Allocation, Seat
from .batch import BatchTurboQuantCache
from .linear import TurboQuantCache
from .rotating import RotatingTurboQuantCache, least_size

__all__ = [
    "Allocation",
    "BatchTurboQuantCache",
    "RotatingTurboQuantCache",
    "Seat",
    "TurboQuantCache",
    "least_size",
]

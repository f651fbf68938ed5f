"""Caches: one layer of one sequence, or of a batch; and bits chosen over layers."""

from .allocation import Allocation, Seat
from .batch import BatchTurboQuantCache
from .linear import TurboQuantCache

__all__ = ["Allocation", "BatchTurboQuantCache", "Seat", "TurboQuantCache"]

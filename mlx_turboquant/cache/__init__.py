"""Caches: one layer of one sequence, or of a batch."""

from .batch import BatchTurboQuantCache
from .linear import TurboQuantCache

__all__ = ["BatchTurboQuantCache", "TurboQuantCache"]

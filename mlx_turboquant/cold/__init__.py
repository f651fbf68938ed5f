"""A colder form of codes: fewer bytes for pages that nobody reads, exactly restored.

Knows codes, no caches and no files: who freezes what, and when, is its callers'.
"""

from .prediction import CodePredictor, LayerCodes
from .records import freeze, restore

__all__ = ["CodePredictor", "LayerCodes", "freeze", "restore"]

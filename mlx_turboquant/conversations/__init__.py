"""Conversations that are remembered: who begins like whom, and what stays of each.

Knows token ids and bytes, no caches: what is remembered is its callers'
(``integrations/prompt_store.py``).
"""

from .index import BLOCK, PrefixIndex, common_length
from .snapshots import spread, stops

__all__ = ["BLOCK", "PrefixIndex", "common_length", "spread", "stops"]

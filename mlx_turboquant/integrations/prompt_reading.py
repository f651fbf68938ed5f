"""Reading a prompt in places, so that what was read is kept whatever comes then.

Owns the loop over one prompt's tokens up to the last, from which mlx-lm's goes on. The
server's is mlx-lm's own (``reading.py``).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .places import Parts, cut_at_places
from .stock import keeps_all

#: Tokens of a long prompt behind which it is kept, should it be given up.
_PIECE = 4096


@dataclass(frozen=True)
class PartRead:
    """What was read of a prompt before mlx-lm's loop has the rest.

    Attributes:
        tokens: How many tokens.
        seconds: How long it took.
    """

    tokens: int
    seconds: float

    def added_to(self, response: Any) -> Any:
        """A response of mlx-lm's, with these tokens and seconds in its numbers."""
        if not self.tokens:
            return response
        rest = response.prompt_tokens / max(response.prompt_tps, 1e-9)
        count = response.prompt_tokens + self.tokens
        speed = count / (self.seconds + rest)
        return replace(response, prompt_tokens=count, prompt_tps=speed)


def segments_of(
    tokens: Sequence[int],
    cache: Sequence[Any],
    find_parts: Callable[[], Parts],
    parted: Sequence[int],
) -> tuple[list[list[int]], list[str]]:
    """A prompt in segments behind which its cache is kept, and their kinds.

    Args:
        tokens: The prompt.
        cache: What will read it. One that can be cut anywhere is kept so that a
            prompt that is given up is not lost; places are for others.
        find_parts: Gives the prompt's parts.
        parted: Where other texts parted from it.
    """
    if keeps_all(cache):
        last = len(tokens) - 1
        ends = [0, *range(_PIECE, last, _PIECE), last, len(tokens)]
        segments = [[*tokens[i:j]] for i, j in itertools.pairwise(ends)]
        return segments, ["user"] * len(segments)
    return cut_at_places(tokens, find_parts(), parted)


def read_prompt(
    network: nn.Module,
    cache: list[Any],
    segments: tuple[list[list[int]], list[str]],
    start: int,
    step: int,
    keep: Callable[[int, str], None],
) -> PartRead:
    """Read all of a prompt but the last token.

    Args:
        network: The model.
        cache: Its cache, which has seen ``start`` tokens.
        segments: As `segments_of` gives them; the last is one token.
        start: Tokens that are not read.
        step: Tokens to read at once.
        keep: Called at the end of each segment with its place and kind.
    """
    begun, before = time.perf_counter(), start
    tokens = [token for segment in segments[0] for token in segment]
    places = itertools.accumulate(len(segment) for segment in segments[0])
    for place, kind in zip(places, segments[1], strict=True):
        if not start < place < len(tokens):
            continue
        for first, last in itertools.pairwise([*range(start, place, step), place]):
            network(mx.array(tokens[first:last])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
        start = place
        keep(place, kind)
    return PartRead(start - before, time.perf_counter() - begun)

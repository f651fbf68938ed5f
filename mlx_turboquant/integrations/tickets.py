"""`Ticket`: one request on its way through the generation thread.

mlx-lm's thread puts what it has of a request on a queue; a ticket is in that queue's
place. It hands things on at once, knows whether the request waits, runs or is over, and
can be cancelled at any time from any thread: the row is freed at that thread's next
turn.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

from mlx_lm.server import GenerationContext


class Cancelled(Exception):
    """Nobody waits for this answer any more."""


class Ticket:
    """One request.

    Args:
        deliver: Called, from the generation thread, with what mlx-lm puts on a
            request's queue: its context, progress as a tuple, tokens, then None or an
            exception.

    Attributes:
        alone: Whether it is served outside of batches, where only an exception ends
            the reading of a prompt.
        taken: Whether the thread has it.
        started: Whether its prompt is being read, or was.
        reserved: Bytes of cache that are set aside for it.
        codes: Those that are for pages of codes.
        born: When it was made, `time.monotonic`.
    """

    def __init__(self, deliver: Callable[[Any], None]) -> None:
        self._deliver = deliver
        self._ended: Callable[[], None] = lambda: None
        self._context: Any = None
        self.alone = self.taken = self.started = False
        self._was_put_back = False
        self.is_done = self.is_cancelled = False
        self.reserved = self.codes = 0
        self.born = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether somebody still waits for something."""
        return not (self.is_done or self.is_cancelled)

    def put_back(self) -> None:
        """The thread had it, and could not begin with it; that may be so once."""
        self.taken, self._was_put_back = self._was_put_back, True

    def reserve(self, nbytes: int, codes: int, ended: Callable[[], None]) -> None:
        """Set memory aside; ``ended`` is called when it is free again."""
        self.reserved, self.codes, self._ended = nbytes, codes, ended

    def put(self, item: Any) -> None:
        """Take what the generation thread has."""
        if isinstance(item, GenerationContext):
            self._context = item
            if self.is_cancelled:
                item.stop()
        else:
            self.started = True
        if item is None or isinstance(item, Exception):
            self.is_done = True
            self._ended()
        if not self.is_cancelled:
            self._deliver(item)
        elif self.alone and isinstance(item, tuple):
            raise Cancelled

    def cancel(self) -> None:
        """Nobody waits any more."""
        self.is_cancelled = True
        self._ended()
        if self._context is not None:
            self._context.stop()


class Line(queue.Queue[Any]):
    """Requests that wait for the thread; cancelled ones leave it unserved."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next (ticket, request, arguments) that somebody waits for."""
        while True:
            entry = super().get(block, timeout)
            if entry[0].is_open:
                entry[0].taken = True
                return entry

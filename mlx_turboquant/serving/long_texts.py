"""`LongTexts`: texts that take long to tokenize, beside the thread that generates.

A megabyte takes about a second, in which nobody's answer would go on. Owns the threads;
what they do is ``integrations/reading.py``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

from ..integrations.supervision import SupervisedGenerator

#: Bytes of a body whose text is long; how many are tokenized at once.
_LONG, _AT_ONCE = 1 << 16, 2


class LongTexts:
    """Tokenizes long requests.

    Args:
        generator: What they are for.

    Attributes:
        count: Requests that are tokenized, or wait for it.
    """

    def __init__(self, generator: SupervisedGenerator) -> None:
        self._generator, self.count = generator, 0
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def prepare(self, size: int, asked: Any, arguments: Any) -> None:
        """Return when a request is tokenized, if it is long.

        Args:
            size: Bytes of its body.
            asked: The request, in mlx-lm's form.
            arguments: Its arguments, likewise.
        """
        if size <= _LONG:
            return
        self.count += 1
        try:
            async with self._turns:
                await self._tokenize(asked, arguments)
        finally:
            self.count -= 1

    async def _tokenize(self, asked: Any, arguments: Any) -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def run() -> None:
            try:
                self._generator.prepare(asked, arguments)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(done.set)

        # It does not hold up the process's end, as a pool's would.
        threading.Thread(target=run, daemon=True).start()
        await done.wait()

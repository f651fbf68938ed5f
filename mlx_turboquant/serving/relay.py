"""`Relay`: a request's answer, from the generation thread to the event loop.

Owns the waiting: what comes next, that nobody waits any more, that it took too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from mlx_lm.server import GenerationContext, Response
from starlette.requests import Request

from ..errors import RequestError, UnsupportedError
from ..integrations.supervision import SupervisedGenerator, TokensCounted
from ..integrations.tickets import Ticket


class Gone(Exception):
    """The client hung up."""


class Relay:
    """One answer, piece by piece, on the event loop.

    Args:
        timeout: Seconds that it may take; None for any.

    Attributes:
        ticket: What the generation thread has of it.
        context: mlx-lm's record of the request, once it is accepted.
    """

    def __init__(self, timeout: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._timeout = timeout
        self._deadline = self._loop.time() + (timeout or 0)
        self.ticket = Ticket(self._from_thread)
        self.context: Any = None

    def _from_thread(self, item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    @contextlib.asynccontextmanager
    async def asked(
        self, generator: SupervisedGenerator, asked: Any, arguments: Any, http: Request
    ) -> AsyncIterator[Relay]:
        """Submit the request; inside, it has been accepted. Leaving frees its row.

        Raises:
            RequestError: if it is refused.
            Gone: if the client hangs up first.
        """
        generator.submit(self.ticket, asked, arguments)
        watch = asyncio.create_task(self._watch(http))
        try:
            self.context = await self._next()
            assert isinstance(self.context, GenerationContext)
            yield self
        finally:
            watch.cancel()
            self.ticket.cancel()

    def seconds(self) -> float:
        """Since the request was made."""
        return time.monotonic() - self.ticket.born

    async def _watch(self, http: Request) -> None:
        """Wait for the client to hang up; its body has been read."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.ticket.cancel()
        self._items.put_nowait(Gone())

    async def _next(self) -> Any:
        limit = self._deadline if self._timeout else None
        try:
            async with asyncio.timeout_at(limit):
                item = await self._items.get()
        except TimeoutError:
            raise RequestError(
                f"the answer took longer than {self._timeout:g} s",
                "lower max_tokens or raise --request-timeout",
                status=504,
            ) from None
        if isinstance(item, RequestError | Gone):
            raise item
        if isinstance(item, UnsupportedError):
            raise RequestError(item.reason, item.remedy)
        if isinstance(item, Exception) and not isinstance(item, TokensCounted):
            first = (str(item).strip() or type(item).__name__).splitlines()[0]
            raise RequestError(
                f"the server met a fault ({first})", "see its log", status=500
            )
        if isinstance(item, Exception):
            raise item
        return item

    async def responses(self) -> AsyncIterator[Response | tuple[int, int]]:
        """mlx-lm's tokens; before them, how much of the prompt is read, of how much.

        Raises:
            RequestError: for a fault, or if it takes too long.
            Gone: if the client hangs up.
        """
        while (item := await self._next()) is not None:
            yield item

"""`Lingering`: an answer reaches a client that is still sending its body.

Owns what is done with a body that nobody read to its end: it is thrown away for a
moment before the answer ends. A socket closed with bytes unread is reset, and the reset
can overtake the answer, so that a client would see a lost connection and not why it was
refused (RFC 9112, section 9.6).
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: How long bytes are thrown away at most, whatever their number.
SECONDS = 2.0


class Lingering:
    """ASGI middleware around everything that may answer early.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; its body is at an end, or given up, when that ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_read = False

        async def note_and_receive() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = not message.get("more_body", False)
            return message

        async def throw_away() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SECONDS):
                    while not is_read:
                        await note_and_receive()

        async def send_and_linger(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get(
                "more_body", False
            )
            if not is_last or is_read:
                await send(message)
                return
            await send({**message, "more_body": True})
            await throw_away()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, note_and_receive, send_and_linger)

"""Starting and stopping the server.

Owns the order of a start, in which every step that can fail says so in one line: the
port, the model, the chat template. And that of an end: requests that run may finish,
within a grace period.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

import mlx.core as mx
import uvicorn
from starlette.applications import Starlette

from ..errors import SpecError
from ..integrations.prompt_store import PromptStore
from ..integrations.server import Provider
from ..integrations.supervision import SupervisedGenerator
from .app import application, fingerprint
from .guard import Access
from .names import Names
from .service import Limits, Service

#: Seconds behind the grace, for errors to be sent to who is cut off, and for texts.
_LAST_WORDS = 5
#: Seconds for a step to end where there is no folder to write to.
_LAST_STEP = 1


@dataclass(frozen=True)
class Settings:
    """A server's, checked.

    Attributes:
        host, port: Where it listens; port 0 is any free one.
        names: What requests may name.
        access: Who may ask.
        limits: How much one request may take.
        kv_memory: Bytes that caches may take; None for any.
        grace: Seconds that running requests get at the end.
    """

    names: Names
    host: str = "127.0.0.1"
    port: int = 8080
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    kv_memory: int | None = None
    grace: float = 30.0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; who connects before the model is loaded waits.

    Raises:
        SpecError: if there is no such host, or the port is taken.
    """
    try:
        infos = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise SpecError(
            f"--host {host!r} is unknown ({error}); use 127.0.0.1, or 0.0.0.0 for all "
            "networks"
        ) from None
    family, kind, protocol, _, address = infos[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise SpecError(
            f"cannot listen at {host} port {port} ({error.strerror}); choose another "
            "--port"
        ) from None
    return bound


class WebServer(uvicorn.Server):
    """Uvicorn around the application: HTTP/1.1, no log of its own.

    Args:
        app: The application.
        generator: Has the requests that run.
        grace: Seconds that they get when the server is told to end.

    Attributes:
        end_by: When all has to be over, `time.monotonic`.
    """

    def __init__(
        self, app: Starlette, generator: SupervisedGenerator, grace: float
    ) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(grace) + _LAST_WORDS,
        )
        super().__init__(config)
        self._generator, self._grace = generator, grace
        self.end_by = 0.0
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers; those that take too long end with an error."""
        self.end_by = time.monotonic() + self._grace + _LAST_WORDS
        self._generator.begin_end()
        loop = asyncio.get_running_loop()
        cut = loop.call_later(self._grace, self._generator.cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()


class SaidOnce(logging.Filter):
    """Lets every warning of mlx-lm's server through once; it warns at each request."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is new."""
        if "mlx_lm" not in record.pathname:
            return True
        is_new = record.getMessage() not in self._said
        if len(self._said) < 1000:
            self._said.add(record.getMessage())
        return is_new


def serve(provider: Provider, store: PromptStore, settings: Settings) -> None:
    """Answer requests until SIGTERM or Ctrl-C.

    Under ``mlx.launch`` every rank calls this; rank 0 answers.

    Raises:
        SpecError: if it cannot listen.
        UnsupportedModelError: if the model or its chat template cannot be used.
    """
    group = mx.distributed.init()
    if settings.kv_memory is not None and group.size() > 1:
        raise SpecError("--kv-memory is for one machine; leave it out with mlx.launch")
    is_front = group.rank() == 0
    bound = listen(settings.host, settings.port) if is_front else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.getLogger().addFilter(SaidOnce())
    generator = SupervisedGenerator(provider, store, settings.kv_memory)
    by, code = math.inf, 0  # a start that failed has ended the thread
    try:
        generator.wait_until_loaded()
        if bound is None:
            generator.join()
            return
        service = Service(
            generator,
            settings.names,
            provider.cli_args,
            settings.limits,
            fingerprint(),
        )
        app = application(service, settings.access)
        host, port = bound.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        logging.info("Listening on http://%s:%d", place, port)
        # Uvicorn ends running requests first, then raises the signal again.
        web = WebServer(app, generator, settings.grace)
        with contextlib.suppress(KeyboardInterrupt):
            web.run(sockets=[bound])
        by = web.end_by if store.folder else time.monotonic() + _LAST_STEP
    except KeyboardInterrupt:
        by, code = time.monotonic(), 128 + signal.SIGINT  # while it was loading
        raise
    finally:
        if bound is not None:
            bound.close()
        if not generator.end(by):
            _leave(code)


def _leave(code: int) -> None:
    """End the process although a thread cannot be ended: it is within MLX.

    What the folder has is whole: it would be after ``kill -9``.
    """
    logging.warning("Ended in the middle of a step; what was not written is lost")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

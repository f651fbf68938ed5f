"""`Guard`: who may ask at all, before a request is read.

Owns the checks of the host that a request names, of the page that it comes from, of the
key, and of a body's size; and the count of requests by status.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from . import anthropic_form, openai_form
from .metrics import Metrics

#: What may be asked without a key, so that supervisors can.
_OPEN_PATHS = ("/health",)
#: Paths that are counted by name; others would let clients make up series.
PATHS = (
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/health",
    "/metrics",
)


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        api_keys: Any of these is asked for, unless there are none.
        hosts: Names that the server may be called by, beside IP addresses and
            ``localhost``; ``*`` for any. A page on another site can only reach the
            server under a name of its own.
        origins: Pages that may ask; ``*`` for any.
        max_body: Bytes that a body may have.
    """

    api_keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ("*",)
    max_body: int = 64 << 20

    def check(self, headers: Headers, path: str, method: str) -> None:
        """Raise `RequestError` unless a request with these headers may be made."""
        if not self._is_known(headers.get("host", "")):
            raise RequestError(
                f"this server is not {headers.get('host', '')[:200]!r}",
                "call it by its address, or name it with --allowed-hosts",
                status=403,
            )
        origin = headers.get("origin")
        if origin and not {"*", origin}.intersection(self.origins):
            raise RequestError(
                f"pages of {origin[:200]!r} may not ask",
                "list it with --allowed-origins",
                status=403,
            )
        if self.api_keys and path not in _OPEN_PATHS and method != "OPTIONS":
            self._check_key(headers)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large(int(length), self.max_body)

    def _is_known(self, host: str) -> bool:
        name = host.rpartition(":")[0] if _has_port(host) else host
        name = name.strip("[]").rstrip(".").lower()
        if "*" in self.hosts or name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (known.lower() for known in self.hosts)
        return True

    def _check_key(self, headers: Headers) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or ""
        if not given and scheme.lower() == "bearer":
            given = bearer.strip()
        keys = [hmac.compare_digest(given.encode(), k.encode()) for k in self.api_keys]
        if not any(keys):
            raise RequestError(
                "the API key is wrong" if given else "there is no API key",
                "send one of --api-key as 'Authorization: Bearer KEY' or 'x-api-key'",
                status=401,
                code="invalid_api_key",
            )


def too_large(size: int, limit: int) -> RequestError:
    """The refusal of a body of ``size`` bytes."""
    return RequestError(
        f"the body has {size} bytes or more, at most {limit} are read",
        "shorten it or raise --max-body",
        status=413,
        code="body_too_large",
    )


def error_response(error: RequestError, path: str) -> Response:
    """An error in the form that the path's clients expect."""
    is_anthropic = path.startswith("/v1/messages")
    form = anthropic_form if is_anthropic else openai_form
    status = 529 if is_anthropic and error.status == 503 else error.status
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 413:
        headers["Connection"] = "close"  # its body is not read to the end
    return JSONResponse(form.error_body(error), status_code=status, headers=headers)


class Guard:
    """ASGI middleware that lets through what `Access` allows, and counts."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        counted = path if path in PATHS else "other"

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(counted, str(message["status"])).inc()
            await send(message)

        try:
            self._access.check(Request(scope).headers, path, scope["method"])
        except RequestError as error:
            await error_response(error, path)(scope, receive, count_and_send)
            return
        await self._app(scope, receive, count_and_send)


def _has_port(host: str) -> bool:
    return (
        ":" in host
        and not host.endswith("]")
        and host.count(":") != 0
        and (host.startswith("[") or host.count(":") == 1)
    )

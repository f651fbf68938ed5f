"""The web application: what answers which path, and errors in the client's form."""

from __future__ import annotations

import logging
import time

from mlx_lm.server import get_system_fingerprint
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import RequestError
from .guard import Access, Guard, error_response
from .lingering import Lingering
from .service import Service


def application(service: Service, access: Access) -> Starlette:
    """The ASGI application.

    Args:
        service: Answers.
        access: Who may ask.
    """
    started = int(time.time())

    def listed(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "mlx-tq",
        }

    async def models(http: Request) -> Response:
        data = [listed(name) for name in service.names.listed]
        return JSONResponse({"object": "list", "data": data})

    async def model(http: Request) -> Response:
        name = http.path_params["name"]
        service.names.resolve(name)
        return JSONResponse(listed(name))

    async def health(http: Request) -> Response:
        is_well = service.generator.is_healthy
        return JSONResponse(
            {"status": "ok" if is_well else "unavailable"}, 200 if is_well else 503
        )

    async def metrics(http: Request) -> Response:
        text = service.metrics.text(service.generator)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completion, methods=["POST"]),
        Route("/v1/messages", service.message, methods=["POST"]),
        Route("/v1/messages/count_tokens", service.count_tokens, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Lingering),
            Middleware(
                CORSMiddleware,
                allow_origins=list(access.origins),
                allow_methods=["*"],
                allow_headers=["*"],
            ),
            Middleware(Guard, access=access, metrics=service.metrics),
        ],
        exception_handlers={
            RequestError: _refused,
            HTTPException: _no_such_route,
            ClientDisconnect: _hung_up,
            Exception: _failed,
        },
    )


def fingerprint() -> str:
    """Which versions and machine answer, as mlx-lm says it."""
    return str(get_system_fingerprint())


async def _refused(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    log = logging.info if error.status < 500 else logging.warning
    log("%s refused with %d: %s", http.url.path, error.status, error)
    return error_response(error, http.url.path)


async def _no_such_route(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another")
        said = RequestError(
            f"{http.method} is not for {http.url.path}", f"use {allowed}", status=405
        )
    else:
        said = RequestError(
            f"there is no {http.url.path[:200]}",
            "docs/serving.md lists what there is",
            status=error.status_code,
        )
    response = error_response(said, http.url.path)
    response.headers.update(error.headers or {})
    return response


async def _hung_up(http: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _failed(http: Request, error: Exception) -> Response:
    said = RequestError(
        f"the server met a fault ({type(error).__name__})", "see its log", status=500
    )
    return error_response(said, http.url.path)

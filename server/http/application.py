"""The application: which path is answered by whom, and what holds for all of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from concertina.addresses import host_of, is_loopback
from concertina.shown import shown
from server.http.errors import HttpError, error_of
from server.http.generation import chat_completions, completions, delete_stream, resume_stream
from server.http.images import generations
from server.http.metrics import Counting, metrics
from server.http.models import (
    detokenize,
    get_model,
    health,
    list_models,
    tokenize,
    tokenizer_info,
    version,
)
from server.http.openapi import document
from server.http.page.chaos import Chaos
from server.http.page.pace import Paces
from server.http.page.routes import PAGE_ROUTES
from server.http.reading.refusals import NOT_HERE, not_here
from server.http.settings import GatewaySettings
from server.http.upstream import connected

_log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]
ROUTES: Final[tuple[tuple[str, str, Endpoint], ...]] = (
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{model:path}", get_model),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/images/generations", generations),
    ("GET", "/v1/streams/{stream_id}", resume_stream),
    ("DELETE", "/v1/streams/{stream_id}", delete_stream),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/tokenizer_info", tokenizer_info),
    ("GET", "/health", health),
    ("GET", "/version", version),
    ("GET", "/metrics", metrics),
    *PAGE_ROUTES,
)
"""Method, path and endpoint of what is offered."""

_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")


def application(settings: GatewaySettings, chaos: Chaos | None = None) -> ASGIApp:
    """The ASGI application of a gateway. chaos: whom its page may kill, in a demo."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with connected(settings) as upstream:
            app.state.upstream = upstream
            yield

    routes = [Route(path, _guarded(path, each), methods=[method]) for method, path, each in ROUTES]
    routes.append(Route("/openapi.json", _guarded("/openapi.json", _openapi)))
    routes += [Route(path, _guarded(path, _refused), methods=_METHODS) for path in NOT_HERE]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _no_such_path},
    )
    app.state.paces, app.state.chaos = Paces(), chaos
    return Counting(_OnlyKnownHosts(app, settings))


def _guarded(path: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint; what it raises becomes an answer."""

    async def answer(request: Request) -> Response:
        request.state.route = path
        try:
            return await endpoint(request)
        except Exception as error:
            told = error_of(error)
            if told.status == 500:
                _log.error("%s failed", path, exc_info=error)
            return told.response()
        finally:
            await request.app.state.upstream.tidy()

    return answer


async def _openapi(_: Request) -> Response:
    return JSONResponse(document())


async def _refused(request: Request) -> Response:
    raise not_here(request.url.path)


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path)}"
    if error.status_code == 405:
        told = HttpError(405, f"{what} is not offered: use another method", code="unsupported")
    else:
        told = HttpError(404, f"{what} is not offered: see /openapi.json", code="unsupported")
    response = told.response()
    response.headers.update(error.headers or {})
    return response


class _OnlyKnownHosts:
    """Refuses a `Host` that is not this machine while only this machine can connect.

    Else a page in a browser could give its own name the address 127.0.0.1, and ask in its own name.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a caller who knows whom he asks."""
        if scope["type"] == "http" and self._settings.only_this_machine:
            host = host_of(Request(scope).headers.get("host", ""))
            if not is_loopback(host) and host not in self._settings.allowed_hosts:
                told = HttpError(
                    403,
                    f"Host is {shown(host)}: this gateway answers to names of this machine only, "
                    "such as localhost; name others with --allow-host",
                    code="unknown_host",
                )
                await told.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

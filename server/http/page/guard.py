"""Who may call what the page calls: the page itself, and programs; no page of another site."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from concertina.shown import shown
from server.http.errors import HttpError
from server.http.settings import GatewaySettings

_OWN_SITE: Final = ("same-origin", "none")  # `none`: an address that somebody typed


_Endpoint = Callable[[Request], Awaitable[Response]]


def own_page(endpoint: _Endpoint) -> _Endpoint:
    """The endpoint, which refuses calls of pages that the gateway has not served."""

    async def answer(request: Request) -> Response:
        require_own_page(request, request.app.state.upstream.settings)
        return await endpoint(request)

    return answer


def require_own_page(request: Request, settings: GatewaySettings) -> None:
    """Raise HttpError if a browser says that a page of another site calls.

    Programs say nothing about it. A browser always does where a page could do harm: no page can
    leave `Origin` out of a POST, or change it.
    """
    site = request.headers.get("sec-fetch-site", "none")
    origin = request.headers.get("origin")
    if site in _OWN_SITE and origin is None:
        return
    named = urlsplit(origin or "")
    is_own = named.netloc == request.headers.get("host", "")
    if site in _OWN_SITE and (is_own or named.hostname in settings.allowed_hosts):
        return
    raise HttpError(
        403,
        f"Origin is {shown(origin or site)}: only the page of this gateway may call this",
        code="foreign_origin",
    )

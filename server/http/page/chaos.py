"""The button that kills a server: for demos, with a token from the terminal that works once."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.http.errors import HttpError
from server.http.page.pace import Paces
from server.http.reading.fields import read_body, text


@dataclass(eq=False)
class Chaos:
    """Whom the button kills, and who may press it.

    kill: kills the server that runs a stream, and gives its name; empty if none does.
    token: makes the first page that shows it the one with the button.
    """

    kill: Callable[[str], Awaitable[str]]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    _secret: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    def admit(self, token: str) -> str:
        """The secret of the page that kills. Raises HttpError, also for a token that was used."""
        if not self.token or not secrets.compare_digest(token.encode(), self.token.encode()):
            raise HttpError(
                403,
                "this link does not work, or no longer: start the demo again for a new one",
                code="chaos_refused",
            )
        self.token = ""
        return self._secret

    def require(self, secret: str) -> None:
        """Raise HttpError unless a page has the button."""
        if not secrets.compare_digest(secret.encode(), self._secret.encode()):
            raise HttpError(403, "only the demo's own page may kill", code="chaos_refused")


def _chaos(request: Request) -> Chaos:
    chaos: Chaos | None = request.app.state.chaos
    if chaos is None:
        what = "nothing may be killed here: start `concertina demo --chaos`"
        raise HttpError(404, what, code="unsupported")
    return chaos


async def admit(request: Request) -> Response:
    """POST /c/chaos: a token for a secret."""
    chaos = _chaos(request)
    body = await read_body(request, request.app.state.upstream.settings)
    return JSONResponse({"secret": chaos.admit(text(body, "token") or "")})


async def kill(request: Request) -> Response:
    """POST /c/chaos/kill: SIGKILL to the server that runs a stream."""
    chaos = _chaos(request)
    body = await read_body(request, request.app.state.upstream.settings)
    chaos.require(text(body, "secret") or "")
    stream_id, began = text(body, "stream") or "", time.monotonic()
    killed = await chaos.kill(stream_id)
    if not killed:
        raise HttpError(409, "no server runs this stream now", code="stream_unsuitable")
    paces: Paces = request.app.state.paces
    paces.lose(stream_id, began)
    return JSONResponse({"killed": killed})

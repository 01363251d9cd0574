"""What the page does with a stream that is kept: pause, copy, take away, bring back, end."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from concertina.client import Session, SessionPhase, SnapshotRefused
from concertina.shown import shown
from server.http.errors import HttpError, invalid
from server.http.page.pace import Paces
from server.http.page.streams import pace
from server.http.reading.fields import integer, read_body
from server.http.settings import GatewaySettings
from server.http.upstream import CALL_SECONDS, Upstream, key_of

_BYTES: Final = "application/octet-stream"
_MOST_COPIES: Final = 8


async def show(request: Request) -> Response:
    """GET /c/sessions/{id}: how far the server is with a stream."""
    upstream: Upstream = request.app.state.upstream
    stream_id = request.path_params["stream_id"]
    with upstream.calling(request) as client:
        for session in await client.sessions.list(timeout=CALL_SECONDS):
            if session.stream_id == stream_id:
                return JSONResponse(_told(session))
    raise HttpError(404, f"no stream {shown(stream_id)} is kept", code="stream_not_found")


async def pause(request: Request) -> Response:
    """POST /c/streams/{id}/pause."""
    upstream: Upstream = request.app.state.upstream
    with upstream.calling(request) as client:
        session = await client.sessions.pause(
            request.path_params["stream_id"], timeout=CALL_SECONDS
        )
    return JSONResponse(_told(session))


async def change_pace(request: Request) -> Response:
    """POST /c/streams/{id}/pace."""
    upstream: Upstream = request.app.state.upstream
    paces: Paces = request.app.state.paces
    per_second = pace(await read_body(request, upstream.settings))
    if (reader := paces.of(key_of(request), request.path_params["stream_id"])) is not None:
        reader.change(per_second)
    return JSONResponse({"pace": per_second})


async def fork(request: Request) -> Response:
    """POST /c/streams/{id}/fork: names of paused copies, each with its own seed."""
    upstream: Upstream = request.app.state.upstream
    n = integer(await read_body(request, upstream.settings), "n") or 1
    if not 1 <= n <= _MOST_COPIES:
        raise invalid("n", f"n is {n}: it must be between 1 and {_MOST_COPIES}")
    with upstream.calling(request) as client:
        made = await client.sessions.fork(request.path_params["stream_id"], n, timeout=CALL_SECONDS)
    return JSONResponse({"ids": made})


async def export(request: Request) -> Response:
    """POST /c/streams/{id}/export: the sealed snapshot."""
    upstream: Upstream = request.app.state.upstream
    with upstream.calling(request) as client:
        snapshot = await client.sessions.export(
            request.path_params["stream_id"], timeout=CALL_SECONDS
        )
    return Response(snapshot, media_type=_BYTES)


async def import_(request: Request) -> Response:
    """POST /c/sessions: a session from a sealed snapshot."""
    upstream: Upstream = request.app.state.upstream
    snapshot = await _bytes(request, upstream.settings)
    with upstream.calling(request) as client:
        try:
            session = await client.sessions.import_(snapshot, timeout=CALL_SECONDS)
        except SnapshotRefused as error:
            raise HttpError(400, str(error), code="snapshot_refused") from None
    return JSONResponse(_told(session))


async def delete(request: Request) -> Response:
    """DELETE /c/streams/{id}: ends it, and forgets it."""
    upstream: Upstream = request.app.state.upstream
    with upstream.calling(request) as client:
        await client.sessions.delete(request.path_params["stream_id"], timeout=CALL_SECONDS)
    return JSONResponse({"deleted": True})


async def _bytes(request: Request, settings: GatewaySettings) -> bytes:
    kind = request.headers.get("content-type", "")
    if kind != _BYTES:  # a type that a page of another site cannot send without asking
        raise HttpError(415, f"Content-Type is {shown(kind)}: send `{_BYTES}`")
    raw = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                raw += part
                if len(raw) > settings.max_body_bytes:
                    raise HttpError(
                        413,
                        f"the snapshot has more than {settings.max_body_bytes:,} bytes, the limit: "
                        "raise it with --max-body-bytes of `concertina gateway`",
                    )
    except TimeoutError:
        limit = f"{settings.body_seconds:g} s"
        raise HttpError(408, f"the body did not arrive within {limit}: send it again") from None
    except ClientDisconnect:
        raise HttpError(499, "the caller is gone") from None
    return bytes(raw)


def _told(session: Session) -> dict[str, Any]:
    return {
        "id": session.stream_id,
        "model": session.model,
        "phase": session.phase,
        "is_running": session.phase is SessionPhase.RUNNING,
        "prompt_tokens": session.prompt_tokens,
        "generated_tokens": session.generated_tokens,
        "state_bytes": session.state_bytes,
    }

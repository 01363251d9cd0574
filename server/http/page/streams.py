"""What the page streams: a new stream, one that continues, and the rest of one it knows."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from concertina.client import (
    Accepted,
    AsyncClient,
    AsyncStream,
    ContinueParameters,
    GenerateParameters,
)
from concertina.client.requests import PromptLike
from concertina.shown import shown
from server.http.errors import invalid
from server.http.page.events import line, told
from server.http.page.pace import RESUME_SECONDS, Pace, Paces, read_slowly
from server.http.reading.fields import Body, boolean, integer, number, read_body, text
from server.http.upstream import Upstream, key_of
from server.http.writing.sse import EventStream, unless_gone

KEEP_SECONDS: Final = 600.0
"""How long a stream waits for a page that was closed or reloaded."""

_TOP: Final = 5
_Opening = Callable[[AsyncClient], AsyncStream]


async def generate(request: Request) -> Response:
    """POST /c/streams: a new stream, which is kept."""
    body = await read_body(request, request.app.state.upstream.settings)
    prompt, parameters = _prompt(body), _generating(body)

    def opened(client: AsyncClient) -> AsyncStream:
        return client.generate(prompt, keep=KEEP_SECONDS, resume_for=RESUME_SECONDS, **parameters)

    return await _streaming(request, opened, pace(body))


async def resume(request: Request) -> Response:
    """GET /c/streams/{id}: all events of a stream, from its beginning or where it continued."""
    stream_id = request.path_params["stream_id"]
    return await _streaming(
        request, lambda client: client.resume(stream_id, resume_for=RESUME_SECONDS), None
    )


async def continue_(request: Request) -> Response:
    """POST /c/streams/{id}/continue: a paused or finished stream goes on."""
    body = await read_body(request, request.app.state.upstream.settings)
    stream_id, more, parameters = (
        request.path_params["stream_id"],
        text(body, "prompt"),
        _more(body),
    )

    def opened(client: AsyncClient) -> AsyncStream:
        return client.sessions.continue_(
            stream_id, more or None, resume_for=RESUME_SECONDS, **parameters
        )

    return await _streaming(request, opened, pace(body))


async def _streaming(request: Request, opened: _Opening, per_second: float | None) -> Response:
    """The response of events, once the first has come: before, what is refused has a status."""
    upstream: Upstream = request.app.state.upstream
    events = _events(request, opened, per_second)
    try:
        first = await unless_gone(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_after(first, events), {}, upstream.settings)  # type: ignore[return-value]


async def _after(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        yield first
        async for each in events:
            yield each


async def _events(
    request: Request, opened: _Opening, per_second: float | None
) -> AsyncGenerator[bytes]:
    upstream: Upstream = request.app.state.upstream
    paces: Paces = request.app.state.paces
    key = key_of(request)
    with upstream.calling(request) as client:
        stream_id, reader = "", Pace(per_second)
        try:
            async with aclosing(read_slowly(client, opened(client), reader)) as events:
                async for event in events:
                    if isinstance(event, Accepted):
                        stream_id = event.stream_id
                        paces.keep(key, stream_id, reader)
                    yield line({"type": "resumed"} if event is None else told(event))
        finally:
            paces.drop(key, stream_id, reader)


def pace(body: Body) -> float | None:
    """Tokens per second, None for as they come. Raises HttpError."""
    given = number(body, "pace")
    if given is not None and not 0 <= given <= 1e6:
        raise invalid("pace", f"pace is {given}: it must be tokens per second, 0 or more")
    return given


def _prompt(body: Body) -> PromptLike | None:
    if (messages := body.get("messages")) is not None:
        return _messages(messages)
    if (rows := text(body, "rows")) is not None:
        try:
            return base64.b64decode(rows, validate=True)
        except binascii.Error:
            raise invalid("rows", "rows is not base64: send three bytes for each pixel") from None
    return text(body, "prompt") or None


def _messages(given: Any) -> list[dict[str, str]]:
    told = f"messages is {shown(given)}: it must be a list of objects with role and content"
    if not isinstance(given, list) or not given:
        raise invalid("messages", told)
    for each in given:
        if not isinstance(each, dict) or set(each) != {"role", "content"}:
            raise invalid("messages", told)
        if not all(isinstance(value, str) for value in each.values()):
            raise invalid("messages", told)
    return given


def _generating(body: Body) -> GenerateParameters:
    return {
        **_more(body),  # type: ignore[typeddict-item]
        "model": text(body, "model") or "",
        "label": text(body, "label"),
        "logprobs": _TOP,
    }


def _more(body: Body) -> ContinueParameters:
    """The parameters that a stream can change when it continues; for what is absent, the server
    chooses, or they are as before."""
    return {
        "temperature": number(body, "temperature"),
        "top_p": number(body, "top_p"),
        "seed": _seed(body),
        "max_tokens": integer(body, "max_tokens"),
        "ignore_eos": boolean(body, "ignore_eos"),
    }


def _seed(body: Body) -> int | None:
    """The seed: digits, since JavaScript has no such numbers. Raises HttpError."""
    given = body.get("seed")
    if given is None or given == "":
        return None
    if isinstance(given, str) and given.isascii() and given.isdecimal() and len(given) <= 20:
        return int(given)
    return integer(body, "seed")

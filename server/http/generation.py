"""The endpoints that generate text: completions, chats, and streams that go on."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from concertina.client import Cursor
from concertina.shown import shown
from server.http.errors import HttpError, invalid
from server.http.reading.fields import Body, read_body
from server.http.reading.parameters import Wanted, wanted_chat, wanted_completion
from server.http.reading.structure import in_words_of
from server.http.runs import Cursors, of_stream, updates
from server.http.upstream import CALL_SECONDS, Upstream
from server.http.writing.answers import CHAT, LEGACY, Answer, Form, chunks, whole_answer
from server.http.writing.sse import EventStream, unless_gone

STREAM_HEADER: Final = "x-concertina-stream"
_CURSOR: Final = re.compile(r"(\d{1,12})\.(\d{1,12})(e?)", re.ASCII)
_MOST_CURSORS: Final = 128
_RESUME_SECONDS: Final = 60.0


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    return await _generate(request, LEGACY, wanted_completion)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await _generate(request, CHAT, wanted_chat)


async def _generate(request: Request, form: Form, read: Callable[[Body], Wanted]) -> Response:
    upstream: Upstream = request.app.state.upstream
    wanted = read(await read_body(request, upstream.settings))
    if wanted.stream:
        cursors = None if wanted.keep is None else _kept(wanted)
        return await _streaming(
            request, upstream, _events(request, upstream, form, wanted, cursors)
        )
    if wanted.keep is not None:
        raise invalid("keep", "keep is given without `stream` true: nobody could take it up")
    return JSONResponse(await unless_gone(request, _answer(request, upstream, form, wanted)))


def _kept(wanted: Wanted) -> Cursors:
    """The cursors of a stream to keep. Raises HttpError if it cannot be one."""
    if len(wanted.prompts) > 1:
        raise invalid("keep", f"keep needs one prompt, and there are {len(wanted.prompts)}")
    if wanted.echo:
        raise invalid("keep", "keep cannot be with `echo`: the prompt is sent once")
    return Cursors()


async def _answer(
    request: Request, upstream: Upstream, form: Form, wanted: Wanted
) -> dict[str, Any]:
    with upstream.calling(request) as client, in_words_of(wanted.structure):
        answer = Answer(form, upstream, client, wanted.logprobs)
        async with aclosing(updates(upstream, client, wanted)) as arriving:
            return await whole_answer(answer, arriving)


async def _events(
    request: Request, upstream: Upstream, form: Form, wanted: Wanted, cursors: Cursors | None
) -> AsyncGenerator[bytes]:
    with upstream.calling(request) as client, in_words_of(wanted.structure):
        answer = Answer(form, upstream, client, wanted.logprobs)
        request.state.answer = answer
        async with (
            aclosing(updates(upstream, client, wanted)) as arriving,
            aclosing(chunks(answer, arriving, wanted.include_usage, cursors)) as events,
        ):
            async for each in events:
                yield each


async def _streaming(
    request: Request, upstream: Upstream, events: AsyncGenerator[bytes]
) -> Response:
    """The response of events, once the first has come: before, what is refused has a status."""
    try:
        await unless_gone(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    names = ",".join(request.state.answer.stream_ids)
    return EventStream(events, {STREAM_HEADER: names}, upstream.settings)  # type: ignore[return-value]


async def resume_stream(request: Request) -> Response:
    """GET /v1/streams/{id}: the rest of a kept stream, after the event that the caller names."""
    upstream: Upstream = request.app.state.upstream
    form, stream_id = _named(request.path_params["stream_id"])
    given = request.query_params.get("after") or request.headers.get("last-event-id", "")
    cursors = Cursors(_cursors(given))
    return await _streaming(request, upstream, _rest(request, upstream, form, stream_id, cursors))


async def _rest(
    request: Request, upstream: Upstream, form: Form, stream_id: str, cursors: Cursors
) -> AsyncGenerator[bytes]:
    with upstream.calling(request) as client:
        stream = client.resume(stream_id, cursors.outputs, resume_for=_RESUME_SECONDS)
        answer = Answer(form, upstream, client, None)
        request.state.answer = answer
        async with (
            aclosing(of_stream(stream, kept=True)) as arriving,
            aclosing(chunks(answer, arriving, True, cursors)) as events,
        ):
            async for each in events:
                yield each


async def delete_stream(request: Request) -> Response:
    """DELETE /v1/streams/{id}: ends a kept stream and forgets it."""
    upstream: Upstream = request.app.state.upstream
    _, stream_id = _named(request.path_params["stream_id"])
    with upstream.calling(request) as client:
        await client.sessions.delete(stream_id, timeout=CALL_SECONDS)
    given = request.path_params["stream_id"]
    return JSONResponse({"id": given, "object": "stream", "deleted": True})


def _named(given: str) -> tuple[Form, str]:
    """The form of an answer by its id, and the name of its stream."""
    for form in (CHAT, LEGACY):
        if given.startswith(form.prefix):
            return form, given.removeprefix(form.prefix)
    return LEGACY, given


def _cursors(given: str) -> list[Cursor]:
    """The cursors in the id of an event. Raises HttpError."""
    if not given:
        return []
    parts = given.split("_", _MOST_CURSORS)
    found = [_CURSOR.fullmatch(part) for part in parts]
    if len(parts) > _MOST_CURSORS or None in found:
        what = f"after is {shown(given)}: give the `id` of an event of this stream, or leave it out"
        raise HttpError(400, what, param="after")
    return [
        Cursor(output, int(match[1]), int(match[2]), bool(match[3]))
        for output, match in enumerate(found)
        if match is not None
    ]

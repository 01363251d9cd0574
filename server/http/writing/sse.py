"""Server-sent events as clients of OpenAI's API need them, and answers that nobody waits for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing, suppress
from typing import Final, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from server.http.errors import HttpError, error_of
from server.http.settings import GatewaySettings

PING: Final = b"\n\n"
"""Empty lines, which readers skip; vLLM's bench loses what follows a comment."""

_Result = TypeVar("_Result")
_BUFFERED: Final = 64
_STOPPING: Final = "the gateway shuts down; try again later"


async def unless_gone(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled if the caller goes. Raises HttpError then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HttpError(499, "the caller is gone")
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of events.

    If they fail, it ends with an error event, and the connection is cut: clients take an end
    without `[DONE]` for a good one.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        headers: Mapping[str, str],
        settings: GatewaySettings,
    ) -> None:
        self._events = events
        self._settings = settings
        self._error: Exception | None = None
        standard = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold events back
        }
        self._headers = [
            (name.encode(), value.encode()) for name, value in (standard | {**headers}).items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it, until its end or until the reader goes."""
        leaving = asyncio.ensure_future(_gone(receive))
        arrived = asyncio.Queue[bytes | None](_BUFFERED)
        pumping = asyncio.ensure_future(self._pump(arrived))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            while not leaving.done():
                part, is_over = await self._next(arrived, leaving)
                if part:
                    await self._send(send, part)
                if is_over:
                    await self._end(send)
                    return
        except TimeoutError:  # a slow reader: there is no use in telling it
            return
        except asyncio.CancelledError:
            await self._fail(send, HttpError(503, _STOPPING, code="unavailable"))
            raise
        finally:
            for task in (pumping, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _pump(self, arrived: asyncio.Queue[bytes | None]) -> None:
        try:
            async with aclosing(self._events) as events:
                async for each in events:
                    await arrived.put(each)
        except Exception as error:
            self._error = error
        await arrived.put(None)

    async def _next(
        self, arrived: asyncio.Queue[bytes | None], leaving: asyncio.Future[None]
    ) -> tuple[bytes, bool]:
        """What has come since, empty lines if nothing has for long, and whether it was the last."""
        if arrived.empty():
            getting = asyncio.ensure_future(arrived.get())
            waited = (getting, leaving)
            await asyncio.wait(
                waited, timeout=self._settings.ping_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not getting.done():
                getting.cancel()
                return b"" if leaving.done() else PING, False
            first = getting.result()
        else:
            first = arrived.get_nowait()
        parts = []
        while first is not None:
            parts.append(first)
            if arrived.empty():
                break
            first = arrived.get_nowait()
        return b"".join(parts), first is None

    async def _send(self, send: Send, part: bytes) -> None:
        async with asyncio.timeout(self._settings.slow_reader_seconds):
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _end(self, send: Send) -> None:
        if self._error is not None:
            await self._fail(send, error_of(self._error))
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, error: HttpError) -> None:
        data = json.dumps(error.body(), ensure_ascii=False)
        with suppress(TimeoutError):
            await self._send(send, f"data: {data}\n\n".encode())

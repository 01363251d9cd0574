"""A server of OpenAI's completions that answers every request as a script tells it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from aiohttp import web

Body: TypeAlias = dict[str, Any]
Answer: TypeAlias = Callable[[Body, "Answering"], Any]
MODELS = ({"id": "script", "object": "model", "max_model_len": 1024},)


class Answering:
    """The answer to one request, written event by event."""

    def __init__(self, request: web.Request) -> None:
        self.request = request
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

    async def start(self) -> None:
        """Send the head, which `event` does as well."""
        if not self._response.prepared:
            await self._response.prepare(self.request)

    async def raw(self, text: str) -> None:
        """Send this as it is."""
        await self.start()
        await self._response.write(text.encode())

    async def event(self, body: Body | str) -> None:
        """Send one event."""
        await self.raw(f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n")

    def cut(self) -> None:
        """Close the connection in the middle."""
        assert self.request.transport is not None
        self.request.transport.close()


def texts(count: int, **more: Any) -> list[Body]:
    """So many events with a text each, of which the last one finishes."""
    return [
        {"id": "cmpl-s", "choices": [{"text": "ab", "finish_reason": None}], **more}
        for _ in range(count - 1)
    ] + [{"id": "cmpl-s", "choices": [{"text": "c", "finish_reason": "length"}], **more}]


def usage(prompt: int, completion: int) -> Body:
    """The event after all texts."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"id": "cmpl-s", "choices": [], "usage": counts}


@asynccontextmanager
async def completing(answer: Answer, models: Sequence[Body] = MODELS) -> AsyncIterator[str]:
    """A running server; its address."""

    async def complete(request: web.Request) -> web.StreamResponse:
        answering = Answering(request)
        replied = await answer(await request.json(), answering)
        return replied or answering._response

    async def list_models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": list(models)})

    app = web.Application()
    app.router.add_get("/v1/models", list_models)
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()

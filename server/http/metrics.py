"""Metrics of a gateway."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.writing.sse import PING

disable_created_metrics()  # a line for each counter and bucket that nobody asks for

_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

REQUESTS: Final = Counter(
    "concertina_http_requests", "Answered HTTP requests.", ("route", "status")
)
FIRST_BYTE: Final = Histogram(
    "concertina_http_time_to_first_byte_seconds",
    "From the request to the first byte of an answer's body that is no ping.",
    ("route",),
    buckets=_BUCKETS,
)
OPEN_REQUESTS: Final = Gauge(
    "concertina_http_requests_open", "HTTP requests that are being answered, streams among them."
)
OPEN_STREAMS: Final = Gauge("concertina_http_streams_open", "Streams of events being sent.")
CUT: Final = Counter(
    "concertina_http_streams_cut",
    "Answers that ended before they were complete: their reader had gone, or the stream failed.",
    ("route",),
)


class Counting:
    """Counts what the application answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, and counts it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, has_body, is_whole = time.monotonic(), 0, False, False
        is_stream = False

        async def counted(message: Message) -> None:
            nonlocal status, has_body, is_whole, is_stream
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
                kind = Headers(raw=message["headers"]).get("content-type", "")
                if kind.startswith("text/event-stream"):
                    is_stream = True
                    OPEN_STREAMS.inc()
                return
            if message.get("body") not in (None, b"", PING) and not has_body:
                has_body = True
                FIRST_BYTE.labels(_route(scope)).observe(time.monotonic() - began)
            is_whole = is_whole or not message.get("more_body")

        with OPEN_REQUESTS.track_inprogress():
            try:
                await self._app(scope, receive, counted)
            finally:
                if is_stream:
                    OPEN_STREAMS.dec()
                REQUESTS.labels(_route(scope), str(status)).inc()
                if status == 200 and not is_whole:
                    CUT.labels(_route(scope)).inc()


def _route(scope: Scope) -> str:
    """The path of the route, without what callers put into it; `other` for an unknown path."""
    return str(scope.get("state", {}).get("route", "other"))


async def metrics(_: Request) -> Response:
    """GET /metrics."""
    return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})

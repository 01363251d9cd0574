"""The paths of the page, and of what it calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from server.http.page import chaos, files, models, sessions, streams
from server.http.page.guard import own_page

_Endpoint = Callable[[Request], Awaitable[Response]]
_CALLED: Final[tuple[tuple[str, str, _Endpoint], ...]] = (
    ("GET", "/c/models", models.models),
    ("POST", "/c/streams", streams.generate),
    ("GET", "/c/streams/{stream_id}", streams.resume),
    ("DELETE", "/c/streams/{stream_id}", sessions.delete),
    ("POST", "/c/streams/{stream_id}/continue", streams.continue_),
    ("POST", "/c/streams/{stream_id}/pause", sessions.pause),
    ("POST", "/c/streams/{stream_id}/pace", sessions.change_pace),
    ("POST", "/c/streams/{stream_id}/fork", sessions.fork),
    ("POST", "/c/streams/{stream_id}/export", sessions.export),
    ("GET", "/c/sessions/{stream_id}", sessions.show),
    ("POST", "/c/sessions", sessions.import_),
    ("POST", "/c/chaos", chaos.admit),
    ("POST", "/c/chaos/kill", chaos.kill),
)
PAGE_ROUTES: Final[tuple[tuple[str, str, _Endpoint], ...]] = (
    ("GET", "/", files.page),
    ("GET", "/c/page.js", files.script),
    ("GET", "/c/page.css", files.style),
    *((method, path, own_page(endpoint)) for method, path, endpoint in _CALLED),
)
"""Method, path and endpoint of each."""

"""A connection of an HTTP caller, with bounds on what comes before a body."""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LARGEST_HEAD: Final = 64 * 1024
"""Bytes that the head of a request may have, give or take what arrives at once."""

head_seconds = 30.0
"""Time for the head of a request to arrive, and for a caller to say anything at all."""


class Connection(HttpToolsProtocol):
    """Uvicorn's, which waits for the end of a request's head forever, and keeps all of it."""

    _head_bytes = 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._late is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._has_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > LARGEST_HEAD:
            self._has_head()
            self.send_400_response(f"The head of a request may have {LARGEST_HEAD:,} bytes.")

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._late = self.loop.call_later(head_seconds, self._give_up)

    def _has_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # of a request behind the one that is being answered
            return
        self._late = None
        self.transport.close()

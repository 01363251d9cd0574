"""Runs a gateway in this process, and ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import uvicorn

from server.auth.file_stamp import stamp
from server.config import TlsConfig
from server.http.application import application
from server.http.connection import Connection
from server.http.page.chaos import Chaos
from server.http.settings import GatewaySettings
from server.ops.ports import require_free
from server.ops.process import STOP_SIGNALS

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop  # type: ignore[assignment]

_BACKLOG: Final = 2048
_POLL_SECONDS: Final = 0.1
renewal_seconds = 5.0
_GRACE_SECONDS: Final = 10.0
_ORPHAN_SECONDS: Final = 5

_log = logging.getLogger(__name__)


def serve(
    settings: GatewaySettings, announce: Callable[[], None], chaos: Chaos | None = None
) -> None:
    """Answer until SIGINT or SIGTERM; then, streams have `drain_seconds` to end.

    Calls `announce` once callers can connect. Raises PortTaken.
    chaos: whom the page may kill, in a demo.
    """
    option = "--http-port" if settings.with_parent else "--port"
    require_free(settings.host, settings.port, f"choose another with {option}")
    # uvicorn says what happened in tracebacks of its own, beside the errors that we log.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    for number in STOP_SIGNALS:  # uvicorn raises them again when it has ended
        signal.signal(number, lambda *_: None)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(settings, announce, chaos))


async def _serve(
    settings: GatewaySettings, announce: Callable[[], None], chaos: Chaos | None
) -> None:
    config = configuration(settings, chaos)
    server = uvicorn.Server(config)
    watching = [asyncio.create_task(_announce(server, announce))]
    if settings.tls is not None:
        watching.append(asyncio.create_task(renew(config, settings.tls)))
    if settings.with_parent:
        watching.append(asyncio.create_task(_end_with_parent(server)))
    try:
        await server.serve(sockets=[listening(settings)])
    finally:
        for task in watching:
            task.cancel()


def configuration(settings: GatewaySettings, chaos: Chaos | None = None) -> uvicorn.Config:
    """How uvicorn runs a gateway."""
    tls = settings.tls
    return uvicorn.Config(
        application(settings, chaos),
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, settings.drain_seconds),
        ssl_context_factory=None if tls is None else lambda *_: _context(tls),
    )


def listening(settings: GatewaySettings) -> socket.socket:
    """A socket that accepts connections where `settings` say."""
    family, kind, _, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM
    )[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # ends connections whose reader takes nothing, after we gave up
        patience_ms = round(1000 * (settings.slow_reader_seconds + _GRACE_SECONDS))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)
    listener.bind(address)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _context(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cert, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def _announce(server: uvicorn.Server, announce: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(_POLL_SECONDS)
    announce()


async def renew(config: uvicorn.Config, tls: TlsConfig) -> None:
    """Use certificates that have changed for connections that come; keep the old ones if bad."""
    seen = stamp(*tls.files)
    while True:
        await asyncio.sleep(renewal_seconds)
        if (now := stamp(*tls.files)) == seen:
            continue
        seen = now
        try:
            renewed = _context(tls)
        except (OSError, ValueError) as error:
            _log.error("keeping the old certificates: %s", error)
        else:
            # A context never forgets an authority, so that each connection gets the newest one.
            assert config.ssl is not None
            config.ssl.sni_callback = _moving_to(renewed)
            _log.info("read the certificate %s", tls.cert)


def _moving_to(context: ssl.SSLContext) -> Callable[[ssl.SSLObject, str | None, object], None]:
    def move(connection: ssl.SSLObject, _: str | None, __: object) -> None:
        connection.context = context

    return move


async def _end_with_parent(server: uvicorn.Server) -> None:
    """End when standard input does, of which the parent holds the other end."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> None:
        with suppress(OSError):
            if os.read(sys.stdin.fileno(), 1024):
                return
        loop.remove_reader(sys.stdin.fileno())
        ended.set()

    loop.add_reader(sys.stdin.fileno(), read)
    await ended.wait()
    server.config.timeout_graceful_shutdown = _ORPHAN_SECONDS  # the server has gone as well
    server.should_exit = True

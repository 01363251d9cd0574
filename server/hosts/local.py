"""Runs the services in this process on plain grpc.aio, without Ray. Starts in a second or two."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from concertina.addresses import join
from server.api.health import SERVICES, all_alive
from server.api.servicers import Servicers, make_servicers
from server.api.wire import add_generation, add_models, add_sessions
from server.auth.tls import server_credentials
from server.config import LARGEST_RESPONSE, ServeConfig
from server.hosts.gateway import Gateway, gateway
from server.hosts.watcher import Watcher
from server.ops.exporter import exporting
from server.ops.logs import log_to_stderr
from server.ops.process import STOP_SIGNALS, share_one_heap
from server.sessions.registry import hand_over
from server.sessions.served_model import serve_bundles
from server.snapshots.opening import open_writer

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop  # type: ignore[assignment]

_LOOPBACK: Final = "127.0.0.1"
_CLOSE_SECONDS: Final = 2.0
_PING_SECONDS: Final = 5 * 60
handshake_seconds = 10.0

_log = logging.getLogger(__name__)


def serve(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Calls `announce` with the data path when the server is ready.

    After the signal, running streams have `drain_seconds` to end; a second signal ends them at
    once. Raises `server.errors.BundleError` for a bundle that cannot be served.
    """
    log_to_stderr()
    share_one_heap()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(config, announce))


def make_server(config: ServeConfig, servicers: Servicers) -> grpc.aio.Server:
    """A server of the services, not yet started, that listens where `config` says.

    Raises ConfigError if the certificates cannot be used.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.max_request_bytes),
            ("grpc.max_send_message_length", LARGEST_RESPONSE),
            ("grpc.so_reuseport", 0),
            # A caller that connects and says nothing, and one that has gone without a word.
            ("grpc.server_handshake_timeout_ms", round(1000 * handshake_seconds)),
            ("grpc.keepalive_time_ms", _PING_SECONDS * 1000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
    )
    add_generation(servicers.generation, server)
    add_sessions(servicers.sessions, server)
    add_models(servicers.models, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicers.health, server)
    if config.keys is None:
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, health, reflection.SERVICE_NAME), server)
    address = join(config.host, config.port)
    if config.tls is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, server_credentials(config.tls))
        if config.plain_port:
            server.add_insecure_port(join(_LOOPBACK, config.plain_port))
    return server


async def _serve(config: ServeConfig, announce: Callable[[str], None]) -> None:
    stopping, stopping_now = _signals()
    with gateway(config) as front:
        await _serve_behind(front, config, announce, stopping, stopping_now)


async def _serve_behind(
    front: Gateway,
    config: ServeConfig,
    announce: Callable[[str], None],
    stopping: asyncio.Event,
    stopping_now: asyncio.Event,
) -> None:
    snapshots = open_writer(config.snapshots, config.snapshot_ttl, config.snapshots_optional)
    models = serve_bundles(config.bundles, config.engine, snapshots)
    with ExitStack() as opened:
        if snapshots is not None:
            opened.callback(snapshots.close, _CLOSE_SECONDS)
        watcher = Watcher(config, models, snapshots)
        opened.callback(watcher.close)
        watcher.start()
        servicers = make_servicers(config.keys, models, snapshots, watcher.draining)
        server = make_server(config, servicers)
        if front.inner:
            server.add_insecure_port(front.inner)
        try:
            with exporting(config.host, config.metrics_port, lambda: all_alive(models)):
                await server.start()
                await asyncio.to_thread(front.wait_until_ready)
                announce("local, without Ray")
                await stopping.wait()
                _log.info("stopping; running streams have %d s to end", config.drain_seconds)
                await _stop_gateway(front, stopping_now)
                await watcher.stop()
                await hand_over(watcher.running, snapshots)
                done = asyncio.create_task(server.stop(config.drain_seconds + _CLOSE_SECONDS))
                second_signal = asyncio.create_task(stopping_now.wait())
                await asyncio.wait(
                    (done, second_signal),
                    timeout=config.drain_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                second_signal.cancel()
        finally:
            opened.close()
            # The streams that were cut off still send an error event.
            await server.stop(_CLOSE_SECONDS)


async def _stop_gateway(front: Gateway, stopping_now: asyncio.Event) -> None:
    """Let the streams of HTTP callers end while the server still goes on with them."""
    stopped = asyncio.create_task(asyncio.to_thread(front.stop))
    second_signal = asyncio.create_task(stopping_now.wait())
    await asyncio.wait((stopped, second_signal), return_when=asyncio.FIRST_COMPLETED)
    if not stopped.done():
        front.kill()
        await stopped
    second_signal.cancel()


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first and the second SIGINT or SIGTERM."""
    first, second = asyncio.Event(), asyncio.Event()

    def receive() -> None:
        (second if first.is_set() else first).set()

    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, receive)
    return first, second

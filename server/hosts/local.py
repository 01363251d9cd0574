"""Runs the services in this process on plain grpc.aio, without Ray. Starts in a second or two."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from concertina.v1 import (
    generation_service_pb2_grpc,
    model_service_pb2_grpc,
    session_service_pb2_grpc,
)
from server.api.generation import GenerationServicer, ModelServicer, open_engines
from server.api.health import SERVICES, HealthServicer, all_alive
from server.api.sessions import SessionServicer
from server.auth.api_keys import Callers
from server.auth.tls import server_credentials
from server.config import ServeConfig
from server.hosts.watcher import Watcher
from server.ops.exporter import exporting
from server.ops.logs import log_to_stderr
from server.ops.process import STOP_SIGNALS, share_one_heap
from server.sessions.registry import Sessions, hand_over
from server.snapshots.snapshots import Keeper, open_keeper

if TYPE_CHECKING:
    from server.engine.engine import Engine

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop  # type: ignore[assignment]

_CLOSE_SECONDS: Final = 2.0

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


def make_server(
    config: ServeConfig,
    engines: Mapping[str, Engine],
    keeper: Keeper | None = None,
    draining: Collection[Engine] = (),
) -> grpc.aio.Server:
    """A server for `engines`, not yet started, that listens where `config` says.

    draining: engines that get no new streams, but still hold sessions that calls may ask for.

    Raises `server.errors.KeysError` or `server.config.ConfigError` if the keys or certificates
    cannot be used.
    """
    callers, sessions = Callers(config.keys), Sessions(engines, keeper, draining)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            ("grpc.so_reuseport", 0),
        ]
    )
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(sessions, callers), server
    )
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(
        SessionServicer(sessions, callers), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        ModelServicer(engines, callers), server
    )
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(engines), server)
    if config.keys is None:
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, health, reflection.SERVICE_NAME), server)
    address = f"{config.host}:{config.port}"
    if config.tls is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, server_credentials(config.tls))
    return server


async def _serve(config: ServeConfig, announce: Callable[[str], None]) -> None:
    stopping, stopping_now = _signals()
    keeper = open_keeper(config.snapshots, config.snapshot_ttl)
    engines = open_engines(config.bundles, config.engine, keeper)
    with ExitStack() as opened:
        if keeper is not None:
            opened.callback(keeper.close, _CLOSE_SECONDS)
        watcher = Watcher(config, engines, keeper)
        opened.callback(watcher.close)
        watcher.start()
        server = make_server(config, engines, keeper, watcher.draining)
        try:
            with exporting(config.host, config.metrics_port, lambda: all_alive(engines)):
                await server.start()
                announce("local, without Ray")
                await stopping.wait()
                _log.info("stopping; running streams have %d s to end", config.drain_seconds)
                await watcher.stop()
                await hand_over(watcher.running, keeper)
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


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first and the second SIGINT or SIGTERM."""
    first, second = asyncio.Event(), asyncio.Event()

    def receive() -> None:
        (second if first.is_set() else first).set()

    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, receive)
    return first, second

"""Runs the services on Ray Serve: the deployment that wraps them, and the cluster that runs it.

The variables of `server.hosts.ray_environment` must be set before this module is imported.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import ray
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from ray import serve as ray_serve
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import default_impl, grpc_util
from ray.serve._private import replica as ray_replica
from ray.serve._private.replica import Replica as RayReplica
from ray.serve.exceptions import RayServeException
from ray.serve.grpc_util import RayServegRPCContext

from concertina.addresses import join
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import session_service_pb2 as session_pb
from server.api.health import is_serving, wait_until_serving
from server.config import ServeConfig
from server.hosts.gateway import gateway
from server.hosts.haproxy import wait_for_replicas
from server.hosts.ray_environment import (
    DIRECT,
    GRPC_HOST,
    HAPROXY,
    LOOPBACK,
    PYTHON_PROXY,
    REQUEST_BYTES,
    SERVICER_FUNCTIONS,
    STATS_PORT,
    data_path,
    plain_port,
)
from server.ops.exporter import exporting
from server.ops.logs import log_to_stderr
from server.ops.ports import free_ports, require_free
from server.ops.process import (
    adopt_orphans,
    end_children,
    ignore_stop_signals,
    interrupt_on_stop_signals,
)

APPLICATION: Final = "concertina"
_OBJECT_STORE_BYTES: Final = 100 * 1024 * 1024  # we do not use it
_LOGGING: Final = {"log_level": "WARNING", "enable_access_log": False}
_MAX_WATCHED_BUNDLES: Final = 64  # with more than these, Ray may limit the streams
_START_SECONDS: Final = 30.0
_KILL_AFTER_SECONDS: Final = 10.0
_FLUSH_SECONDS: Final = 10.0


class StartFailed(Exception):
    """Ray Serve could not start a replica. The message has the reason."""


def _unary(service: str, name: str, empty: Callable[[], Message]) -> Any:
    """The method of a replica for a gRPC method with one response, which is `empty` if refused."""

    async def method(self: Replica, request: Any, grpc_context: RayServegRPCContext) -> Message:
        answer: Message | None = await getattr(getattr(self, service), name)(request, grpc_context)
        return empty() if answer is None else answer

    method.__name__ = name
    return method


class Replica:
    """One server process: an engine for each bundle, and the services on top of them.

    Ray Serve calls the method with the name of the gRPC method. It needs a response even if the
    call is refused.
    """

    def __init__(self, config: ServeConfig) -> None:
        # Imported here because Ray's proxies also import this module, but need no engine.
        from server.api.servicers import make_servicers
        from server.hosts.watcher import Watcher
        from server.sessions.served_model import serve_bundles
        from server.snapshots.opening import open_writer

        log_to_stderr()
        self.watcher: Watcher | None = None  # for `__del__`, if the next lines fail
        self.snapshots = open_writer(
            config.snapshots, config.snapshot_ttl, config.snapshots_optional, config.replicas
        )
        self.served = serve_bundles(config.bundles, config.engine, self.snapshots)
        self.watcher = Watcher(config, self.served, self.snapshots)
        self.watcher.start()
        services = make_servicers(config.keys, self.served, self.snapshots, self.watcher.draining)
        self.generation, self.sessions = services.generation, services.sessions
        self.models, self.health = services.models, services.health
        before_shutdown(self._hand_over)

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """GenerationService.Generate."""
        async for response in self.generation.Generate(request, grpc_context):
            yield response
        _report_status(grpc_context)

    async def Resume(
        self, request: pb.ResumeRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """GenerationService.Resume."""
        async for response in self.generation.Resume(request, grpc_context):
            yield response
        _report_status(grpc_context)

    async def Continue(
        self, request: session_pb.ContinueRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """SessionService.Continue."""
        async for response in self.sessions.Continue(request, grpc_context):
            yield response
        _report_status(grpc_context)

    async def Export(
        self, request: session_pb.ExportRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[session_pb.ExportResponse]:
        """SessionService.Export."""
        async for response in self.sessions.Export(request, grpc_context):
            yield response
        _report_status(grpc_context)

    Score = _unary("generation", "Score", pb.ScoreResponse)
    Pause = _unary("sessions", "Pause", session_pb.PauseResponse)
    Fork = _unary("sessions", "Fork", session_pb.ForkResponse)
    Import = _unary("sessions", "Import", session_pb.ImportResponse)
    Delete = _unary("sessions", "Delete", session_pb.DeleteResponse)
    ListSessions = _unary("sessions", "ListSessions", session_pb.ListSessionsResponse)
    ListModels = _unary("models", "ListModels", model_pb.ListModelsResponse)
    GetModel = _unary("models", "GetModel", model_pb.GetModelResponse)
    Tokenize = _unary("models", "Tokenize", model_pb.TokenizeResponse)
    Detokenize = _unary("models", "Detokenize", model_pb.DetokenizeResponse)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1.Health.Check."""
        return await self.health.Check(request, grpc_context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """grpc.health.v1.Health.Watch."""
        async for response in self.health.Watch(request, grpc_context):
            yield response

    def check_health(self) -> None:
        """Raise RuntimeError if an engine has died; Ray Serve then replaces this replica."""
        if dead := [name for name, model in list(self.served.items()) if not model.alive]:
            raise RuntimeError(f"the engine of {', '.join(dead)} has died")

    async def _hand_over(self) -> None:
        from server.sessions.registry import hand_over

        if self.watcher is not None:
            await self.watcher.stop()
            await hand_over(self.watcher.running, self.snapshots)

    def __del__(self) -> None:
        if self.watcher is not None:
            self.watcher.close()
        if self.snapshots is not None:
            self.snapshots.close(_FLUSH_SECONDS)


def _report_status(context: RayServegRPCContext) -> None:
    """Raise if a stream was refused: Ray's Python proxy sees a status only in an exception."""
    if context.code() and data_path(os.environ) == PYTHON_PROXY:
        raise RuntimeError("refused")


def before_shutdown(act: Callable[[], Awaitable[None]]) -> None:
    """Make the replica in this process call `act` when it is asked to stop, before it drains.

    Ray Serve has no hook for this. Streams that `act` hands over end before the drain.
    """
    graceful = RayReplica._perform_graceful_shutdown

    async def shut_down(replica: RayReplica) -> None:
        await act()
        await graceful(replica)  # type: ignore[no-untyped-call]

    RayReplica._perform_graceful_shutdown = shut_down  # type: ignore[method-assign]


def bind_grpc_to_host() -> list[object]:
    """Make the gRPC servers of this process listen on one address each instead of all interfaces.

    Ray Serve calls this in proxies and replicas before their servers start, and expects a list of
    HTTP middlewares. A replica's second server, for Ray's own routers, belongs on loopback.
    """
    host = os.environ[GRPC_HOST]

    def add_address(server: grpc.aio.Server, address: str) -> None:
        port = int(address.rpartition(":")[2])
        try:
            require_free(host, port, "trying the next one")
        except OSError as error:  # on a RuntimeError, Ray Serve tries the next port
            raise RuntimeError(str(error)) from None
        server.add_insecure_port(join(host, port))

    def add_inner_address(server: grpc.aio.Server, address: str) -> int:
        return int(add_port_to_grpc_server(server, f"{LOOPBACK}:{address.rpartition(':')[2]}"))

    default_impl.add_grpc_address = add_address  # type: ignore[assignment]
    received = ("grpc.max_receive_message_length", int(os.environ[REQUEST_BYTES]))
    grpc_util.DEFAULT_GRPC_SERVER_OPTIONS.insert(0, received)  # type: ignore[attr-defined]
    ray_replica.add_port_to_grpc_server = add_inner_address  # type: ignore[attr-defined]
    return []


def application(config: ServeConfig, metrics: Path) -> ray_serve.Application:
    """The Ray Serve application for `config`; its replicas write metrics to the given folder."""
    streams = config.engine.slots + config.engine.queue_limit
    streams *= len(config.bundles) or _MAX_WATCHED_BUNDLES
    deployment = ray_serve.deployment(
        num_replicas=config.replicas,
        # The engines have lower limits, so that they refuse a request before Ray does.
        max_ongoing_requests=2 * streams + 1000,
        graceful_shutdown_timeout_s=config.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        max_constructor_retry_count=1,
        ray_actor_options={
            # `config` sets the engines' threads; Ray need not reserve cores for them.
            "num_cpus": 0,
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}},
        },
    )(Replica)
    return deployment.bind(config)


def serve(config: ServeConfig, directory: Path, announce: Callable[[str], None]) -> None:
    """Serve until KeyboardInterrupt. Calls `announce` with the data path when the server is ready.

    Running streams then have `drain_seconds` to end; a second interrupt ends them at once.
    directory: for files that the server needs while it runs. Raises `StartFailed`.
    """
    log_to_stderr()
    metrics = directory / "metrics"
    metrics.mkdir()
    path = data_path(os.environ)
    adopt_orphans()
    host = config.host if config.tls is None else LOOPBACK
    plain = replace(config, host=host, port=plain_port(config, os.environ))
    with exporting(config.host, config.metrics_port, partial(is_serving, plain.address), metrics):
        try:
            with gateway(config, plain.address) as front:
                _start(plain, metrics, path)
                front.wait_until_ready()
                announce(path)
                with suppress(KeyboardInterrupt):
                    threading.Event().wait()
                front.stop()  # its streams end while the replicas still go on with them
        except (KeyboardInterrupt, SystemExit):  # Ray raises SystemExit on SIGTERM while it starts
            pass
        finally:
            _stop()


def _start(config: ServeConfig, metrics: Path, path: str) -> None:
    """Start a cluster on this machine that serves `config` in plaintext; return when it answers."""
    ray.init(
        address="local",
        num_cpus=1,  # Ray starts this many idle workers; we need none
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )
    interrupt_on_stop_signals()  # again, because Ray installs its own handlers
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http_port, proxy_port = free_ports(2)
    ray_serve.start(
        # Ray puts HAProxy's gRPC listener here, too; our script puts it where it belongs.
        http_options={"host": LOOPBACK, "port": http_port},
        grpc_options={
            "port": proxy_port if path == DIRECT else config.port,
            "grpc_servicer_functions": list(SERVICER_FUNCTIONS),
            "enable_reflection": config.keys is None,
        },
        logging_config=_LOGGING,
    )
    try:
        ray_serve.run(application(config, metrics), name=APPLICATION, logging_config=_LOGGING)
    except RuntimeError:
        deployments = ray_serve.status().applications[APPLICATION].deployments
        reason = deployments[Replica.__name__].message.rstrip().splitlines()[-1]
        raise StartFailed(f"a replica did not start: {reason}") from None
    wait_until_serving(config.address, _START_SECONDS)
    if path == HAPROXY:
        stats_port, backend = int(os.environ[STATS_PORT]), f"grpc-{APPLICATION}"
        wait_for_replicas(stats_port, backend, config.replicas, _START_SECONDS)


def _stop() -> None:
    """Let running streams end, stop the cluster, and make sure that no process is left."""
    try:
        with redirect_stdout(io.StringIO()):  # Ray prints that its controller ended
            if ray.is_initialized():
                with suppress(KeyboardInterrupt, RayServeException):
                    ray_serve.delete(APPLICATION)
                ignore_stop_signals()
                ray_serve.shutdown()
            ray.shutdown()
    finally:
        end_children(_KILL_AFTER_SECONDS)

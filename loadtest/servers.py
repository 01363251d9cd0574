"""Servers on this machine, in processes of their own, started by their command line."""

from __future__ import annotations

import base64
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from concertina.client.channel import channel_options

START_LIMIT_S = 120.0
_STOP_LIMIT_S = 60.0
_ANSWER_LIMIT_S = 1.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Server:
    """A server that answers. ready_s: from the start of its process to its first answer."""

    address: str
    process: psutil.Popen
    ready_s: float


@contextmanager
def serving(
    bundle: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Serve a bundle at free ports, and end the server afterwards.

    Raises RuntimeError when the server ends before it answers, or does not answer in time.
    """
    port, metrics_port = free_ports(2)
    address, started = f"127.0.0.1:{port}", time.perf_counter()
    process = start(bundle, *options, port=port, metrics_port=metrics_port, environment=environment)
    try:
        while not is_serving(address):
            late = time.perf_counter() - started > START_LIMIT_S
            if late or process.poll() is not None:
                raise RuntimeError(f"the server does not start; see why: {' '.join(process.args)}")
            time.sleep(_POLL_S)
        yield Server(address, process, time.perf_counter() - started)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(_STOP_LIMIT_S)


def start(
    bundle: Path,
    *options: str,
    port: int,
    metrics_port: int,
    environment: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> psutil.Popen:
    """Start `concertina serve`, and return before it answers.

    What it prints is appended to the file `output`, or discarded.
    """
    command = [sys.executable, "-m", "concertina.cli.main", "serve", str(bundle), *options]
    command += ["--port", str(port), "--metrics-port", str(metrics_port)]
    if "--http-port" not in options:
        command += ["--http-port", "0"]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    with open(output or os.devnull, "ab") as printed:
        return psutil.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )


def new_snapshot_key() -> dict[str, str]:
    """An environment with a random key for snapshots; servers that share a store share it."""
    return {"CONCERTINA_SNAPSHOT_KEY": base64.b64encode(secrets.token_bytes(32)).decode()}


def is_serving(address: str) -> bool:
    """Whether a healthy server answers at `address` within a second."""
    with grpc.insecure_channel(address, options=channel_options(address)) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            response = check(
                health_pb2.HealthCheckRequest(), timeout=_ANSWER_LIMIT_S, wait_for_ready=True
            )
        except grpc.RpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def free_ports(count: int) -> list[int]:
    """Distinct ports on which nobody listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

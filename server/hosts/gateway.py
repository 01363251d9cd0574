"""The gateway that `serve` starts: a process of its own, which ends with the server."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from concertina.addresses import reachable
from server.config import ServeConfig

_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 5.0


class GatewayFailed(Exception):
    """The gateway does not start."""


@dataclass(frozen=True)
class Gateway:
    """A gateway's process, and where it is to call the server; without a process, there is none.

    inner: the address of a socket in plaintext, in a folder that only this user can read, on which
    the server has to listen as well; empty if the gateway calls the server's own address.
    """

    config: ServeConfig
    process: subprocess.Popen[bytes] | None = None
    inner: str = ""

    def wait_until_ready(self) -> None:
        """Return when callers can connect. Raises GatewayFailed."""
        if self.process is None:
            return
        deadline = time.monotonic() + _START_SECONDS
        address = (reachable(self.config.host), self.config.http_port)
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(address, timeout=1).close()
            except OSError:
                time.sleep(_POLL_SECONDS)
            else:
                return
        raise GatewayFailed(
            f"the gateway on port {self.config.http_port} did not start; its log is above"
        )

    def stop(self) -> None:
        """Let its streams end, for as long as the server lets them, and end it."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(self.config.drain_seconds + _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextmanager
def gateway(config: ServeConfig, upstream: str = "") -> Iterator[Gateway]:
    """Run the gateway of a server while the context is open; it is killed if it was not stopped.

    upstream: address of the server, in plaintext; empty for that of `config`.
    """
    if not config.http_port:
        yield Gateway(config)
        return
    with ExitStack() as stack:
        inner = ""
        if not upstream and config.tls is not None:
            # Only with the address of a name in its certificate could the gateway use TLS.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="concertina-"))
            inner = f"unix:{Path(folder) / 'gateway.sock'}"
        command = _command(config, upstream or inner or config.address)
        process = subprocess.Popen(command, stdin=subprocess.PIPE)  # its end is the end of both
        running = Gateway(config, process, inner)
        stack.callback(running.kill)
        stack.callback(process.stdin.close)  # type: ignore[union-attr]
        yield running


def _command(config: ServeConfig, upstream: str) -> list[str]:
    command = [sys.executable, "-m", "concertina.cli.main", "gateway", "--with-parent"]
    command += ["--upstream", upstream, "--host", config.host, "--port", str(config.http_port)]
    command += ["--drain-seconds", str(config.drain_seconds)]
    if config.tls is not None:
        command += ["--tls-cert", str(config.tls.cert), "--tls-key", str(config.tls.key)]
        if config.tls.client_ca is not None:
            command += ["--tls-client-ca", str(config.tls.client_ca)]
    return command

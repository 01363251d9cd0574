"""The gateway that `serve` starts: a process of its own, which ends with the server.

When it dies, it is started again: whoever calls over gRPC must not lose the server to it, and
whoever watches the server alone must not have to.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from concertina.addresses import reachable
from server.config import ServeConfig

_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 30.0

_log = logging.getLogger(__name__)


class GatewayFailed(Exception):
    """The gateway does not start."""


@dataclass(eq=False)
class Gateway:
    """A gateway's process, if there is one.

    command: starts it; empty for none.
    inner: the address of a socket in plaintext, in a folder that only this user can read, on which
    the server has to listen as well; empty if the gateway calls the server's own address.
    """

    config: ServeConfig
    command: tuple[str, ...] = ()
    inner: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _keeping: threading.Thread | None = None

    def start(self) -> None:
        """Start it, without waiting for it."""
        if self.command:
            self._process = _started(self.command)

    def wait_until_ready(self) -> None:
        """Return when callers can connect. Raises GatewayFailed.

        From then on, it is started again when it dies.
        """
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + _START_SECONDS
        address = (reachable(self.config.host), self.config.http_port)
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(address, timeout=1).close()
            except OSError:
                time.sleep(_POLL_SECONDS)
            else:
                self._keeping = threading.Thread(target=self._keep, args=(process,), daemon=True)
                self._keeping.start()
                return
        raise GatewayFailed(
            f"the gateway on port {self.config.http_port} did not start; its log is above"
        )

    def _keep(self, process: subprocess.Popen[bytes]) -> None:
        """Start it again whenever it ends, after pauses that grow while it does not live longer."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            code = _ended(process)
            if time.monotonic() - began > _LONGEST_PAUSE_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            # A signal to all processes reaches this one, too, but perhaps a little later.
            if self._stopping.wait(pause):
                return
            _log.error(
                "the gateway on port %d has ended (%s): starting it again",
                self.config.http_port,
                _how(code),
            )
            with self._lock:
                if self._stopping.is_set():
                    return
                try:
                    self._process = process = _started(self.command)
                except OSError as error:  # no memory, or no more processes: later there may be
                    _log.error("the gateway cannot be started: %s", error)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def stop(self) -> None:
        """Let its streams end, for as long as the server lets them, and end it."""
        process = self._last()
        if process is None:
            return
        process.terminate()
        try:
            process.wait(self.config.drain_seconds + _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        process = self._last()
        if process is None:
            return
        process.kill()
        _ended(process)
        if self._keeping is not None:
            self._keeping.join()

    def _last(self) -> subprocess.Popen[bytes] | None:
        """The process after which no other is started."""
        self._stopping.set()
        with self._lock:
            return self._process


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
        running = Gateway(config, _command(config, upstream or inner or config.address), inner)
        stack.callback(running.kill)
        running.start()
        yield running


def _started(command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.PIPE)  # its end is the end of both


def _ended(process: subprocess.Popen[bytes]) -> int:
    """With which code a process ends."""
    code = process.wait()
    assert process.stdin is not None
    process.stdin.close()
    return code


def _how(code: int) -> str:
    """How a process with this code has ended."""
    return f"signal {-code}" if code < 0 else f"code {code}"


def _command(config: ServeConfig, upstream: str) -> tuple[str, ...]:
    command = [sys.executable, "-m", "concertina.cli.main", "gateway", "--with-parent"]
    command += ["--upstream", upstream, "--host", config.host, "--port", str(config.http_port)]
    command += ["--drain-seconds", str(config.drain_seconds)]
    if config.tls is not None:
        command += ["--tls-cert", str(config.tls.cert), "--tls-key", str(config.tls.key)]
        if config.tls.client_ca is not None:
            command += ["--tls-client-ca", str(config.tls.client_ca)]
    return tuple(command)

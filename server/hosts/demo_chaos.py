"""What `concertina demo --chaos` does: two servers, one store, and a page that kills them."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console

from concertina.client import Client, ConcertinaError, SessionPhase
from concertina.machine import cores
from server.http.page.chaos import Chaos
from server.http.process import serve
from server.http.settings import GatewaySettings
from server.ops.ports import free_ports
from server.snapshots.sealer import KEY_VARIABLE

_NAMES: Final = ("one", "two")
_START_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 30.0
_CALL_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.1


class ChaosFailed(Exception):
    """A server of the demo does not start."""


@dataclass(eq=False)
class _Replica:
    """A server, which is started again when it was killed."""

    name: str
    address: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: psutil.Popen

    @staticmethod
    def start(name: str, bundles: list[Path], store: Path, key: str) -> _Replica:
        port, metrics_port = free_ports(2)
        command = [sys.executable, "-m", "concertina.cli.main", "serve", *map(str, bundles)]
        command += ["--local", "--port", str(port), "--metrics-port", str(metrics_port)]
        command += ["--http-port", "0", "--threads", str(max(1, cores() // 2))]
        command += ["--snapshots", f"file://{store / 'streams'}", "--snapshot-interval", "64"]
        command += ["--drain-seconds", "1"]
        environment, log = os.environ | {KEY_VARIABLE: key}, store / f"{name}.log"
        process = _started(command, environment, log)
        return _Replica(name, f"127.0.0.1:{port}", command, environment, log, process)

    def wait_until_ready(self) -> None:
        """Raises ChaosFailed."""
        deadline = time.monotonic() + _START_SECONDS
        while "\nready" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.stderr.write(self.log.read_text())
                raise ChaosFailed(f"the server {self.name} did not start; its log is above")
            time.sleep(_POLL_SECONDS)

    def runs(self, stream_id: str) -> bool:
        """Whether it generates this stream."""
        if self.process.poll() is not None:
            return False
        with suppress(ConcertinaError), Client(self.address) as client:
            for session in client.sessions.list(timeout=_CALL_SECONDS):
                if session.stream_id == stream_id:
                    return session.phase is SessionPhase.RUNNING
        return False

    def kill(self) -> None:
        """Kill it, and start it again."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = _started(self.command, self.environment, self.log)

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except psutil.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _started(command: list[str], environment: dict[str, str], log: Path) -> psutil.Popen:
    with log.open("a") as output:
        return psutil.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def serve_chaos(bundles: list[Path], console: Console, port: int) -> None:
    """Serve the page at a port of this machine, until Ctrl-C. Raises ChaosFailed."""
    with replicas(bundles, console) as servers:
        alone = threading.Lock()  # a second press must not start a second server in its place

        def kill(stream_id: str) -> str:
            with alone:
                for each in servers:
                    if each.runs(stream_id):
                        each.kill()
                        return each.name
            return ""

        settings = GatewaySettings(
            "ipv4:" + ",".join(each.address for each in servers), port=port, drain_seconds=1
        )
        button = Chaos(lambda stream_id: asyncio.to_thread(kill, stream_id))

        def announce() -> None:
            console.print(f"page: {settings.url}/#chaos={button.token}", soft_wrap=True)
            console.print("the link works once; Ctrl-C ends everything")

        with suppress(KeyboardInterrupt):
            serve(settings, announce, button)


@contextmanager
def replicas(bundles: list[Path], console: Console) -> Iterator[list[_Replica]]:
    """Two servers that share a store; they and the store are gone afterwards."""
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    with ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="concertina-")))
        servers = []
        for name in _NAMES:
            server = _Replica.start(name, bundles, store, key)
            stack.callback(_stop(server))
            servers.append(server)
        console.print("starting two servers that share a store")
        for server in servers:
            server.wait_until_ready()
        yield servers


def _stop(server: _Replica) -> Callable[[], None]:
    return server.stop

"""Real servers, each in processes of its own, as `concertina serve` starts them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from server.ops.ports import free_ports

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str
    metrics_address: str
    process: psutil.Popen
    log: Path
    http_address: str = ""

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over every sample that has these labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def concertina(*arguments: str, cwd: Path | None = None, **pipes: object) -> psutil.Popen:
    """The command line of this checkout, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "COLUMNS": "200"}
    command = [sys.executable, "-m", "concertina.cli.main", *arguments]
    return psutil.Popen(command, env=environment, cwd=cwd, **pipes)


@contextmanager
def serving(*arguments: str, port: int | None = None, http: bool = False) -> Iterator[Server]:
    """A server with these arguments. It has to stop cleanly and to leave no process behind.

    http: whether it answers OpenAI's API, too.
    """
    free, metrics_port, http_port = free_ports(3)
    port = port or free
    address, metrics_address = f"127.0.0.1:{port}", f"127.0.0.1:{metrics_port}"
    http_address = f"127.0.0.1:{http_port}" if http else ""
    ports = ("--port", str(port), "--metrics-port", str(metrics_port))
    ports += ("--http-port", str(http_port if http else 0))
    with tempfile.NamedTemporaryFile() as log:
        process = concertina("serve", *arguments, *ports, stdout=log, stderr=log)
        server = Server(address, metrics_address, process, Path(log.name), http_address)
        try:
            until(lambda: "\nready" in server.output() or process.poll() is not None, START_SECONDS)
            assert process.poll() is None, server.output()
            yield server
        finally:
            left = stop(process)
        assert process.returncode == 0, server.output()
        assert not left


def stop(process: psutil.Popen) -> list[str]:
    """End a server as Ctrl-C would, and with force what that leaves; the names of the latter."""
    if process.poll() is not None:
        return []
    processes = [process, *process.children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    names = [f"{left.pid} {left.name()}" for left in alive if left.is_running()]
    for left in alive:
        left.kill()
    psutil.wait_procs(alive, timeout=10)
    return names


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for the condition; fail when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.05)

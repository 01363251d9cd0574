from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from server.ops.exporter import exporting
from server.ops.ports import PortTaken, free_ports, require_free

PROCESS = """
import sys
from prometheus_client import Counter, Gauge
Counter("steps", "Steps.").inc(5)
Gauge("streams", "Streams.", multiprocess_mode="livesum").set(3)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def process(directory: Path) -> Iterator[None]:
    """A process that counts into the directory, and ends with the context."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS], stdin=pipe, stdout=pipe, env=environment, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        yield
        running.communicate(timeout=10)


def healthy() -> bool:
    return True


def page(port: int) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return [line for line in response.read().decode().splitlines() if line[0] != "#"]


def test_processes_that_share_a_directory_are_one_page(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with ExitStack() as stack:
        stack.enter_context(exporting("127.0.0.1", port, healthy, tmp_path))
        stack.enter_context(process(tmp_path))
        with process(tmp_path):
            assert sorted(page(port)) == ["steps_total 10.0", "streams 6.0"]
        # What a dead process counted stays counted; what it held, it holds no longer.
        assert sorted(page(port)) == ["steps_total 10.0", "streams 3.0"]


def test_without_a_directory_it_is_the_page_of_this_process() -> None:
    (port,) = free_ports(1)
    with exporting("127.0.0.1", port, healthy):
        assert any(line.startswith("process_resident_memory_bytes ") for line in page(port))
        with pytest.raises(PortTaken):
            require_free("127.0.0.1", port, "")
    require_free("127.0.0.1", port, "")


def test_port_0_serves_nothing() -> None:
    with exporting("127.0.0.1", 0, healthy):
        pass


def test_health_sets_the_status() -> None:
    (port,) = free_ports(1)
    answers = [True, False]
    with exporting("127.0.0.1", port, lambda: answers.pop(0)):
        url = f"http://127.0.0.1:{port}/healthz"
        with urllib.request.urlopen(url, timeout=10) as response:
            assert response.status == 200
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(url, timeout=10)
        with raised.value as response:
            assert response.status == 503

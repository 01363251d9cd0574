"""The HTTP server for Prometheus metrics and for health checks.

Metrics are those of this process, or of all processes that share a directory. Health is also
available here because a probe may support neither TLS nor gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from prometheus_client import REGISTRY, CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

HEALTH_PATH: Final = "/healthz"


class SharedDirectory(Collector):
    """Metrics of all processes that write to one directory (their `PROMETHEUS_MULTIPROC_DIR`).

    Live gauges of a dead process are left out; its counters remain.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metrics = MultiProcessCollector(None, path=str(directory))

    def collect(self) -> Iterator[Metric]:
        """All metrics, aggregated over the processes."""
        # Files are named after the kind of metric and the process: `counter_4711.db`.
        for pid in {int(path.stem.rpartition("_")[2]) for path in self._directory.glob("*.db")}:
            if not psutil.pid_exists(pid):
                mark_process_dead(pid, path=str(self._directory))
        yield from self._metrics.collect()


@contextmanager
def exporting(
    host: str, port: int, is_healthy: Callable[[], bool], directory: Path | None = None
) -> Iterator[None]:
    """Serve `/metrics` and `/healthz` while the context is open.

    Metrics are those of this process, or of `directory` if it is given. `/healthz` answers 200 if
    `is_healthy()`, else 503. Port 0 serves nothing.
    """
    if port == 0:
        yield
        return
    registry = REGISTRY
    if directory is not None:
        registry = CollectorRegistry()
        registry.register(SharedDirectory(directory))
    server, thread = start_http_server(port, addr=host, registry=registry)
    page = server.get_app()
    assert page is not None
    server.set_app(_with_health(page, is_healthy))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _with_health(metrics: WSGIApplication, is_healthy: Callable[[], bool]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != HEALTH_PATH:
            return metrics(environ, start_response)
        status = "200 OK" if is_healthy() else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain")])
        return [status.encode()]

    return answer

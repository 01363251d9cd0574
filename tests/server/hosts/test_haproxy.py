from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.hosts.haproxy import wait_for_replicas
from server.ops.ports import free_ports

HEADER = "# pxname,svname,qcur,status,weight,act,bck,chkfail"
REPLICA = "grpc-concertina,replica-{},0,{},1,1,0,0"
STAND_IN = "grpc-concertina,proxy,0,UP,1,0,1,0"
REST = "grpc-concertina,BACKEND,0,UP,1,1,0,0\nhttp-concertina,replica-1,0,UP,1,1,0,0"


@contextmanager
def stats(*pages: str) -> Iterator[int]:
    """The port of an HAProxy whose stats are these pages, one after the other."""
    left = list(pages)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/stats;csv"
            self.send_response(200)
            self.end_headers()
            self.wfile.write((left.pop(0) if len(left) > 1 else left[0]).encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def page(*rows: str) -> str:
    return "\n".join((HEADER, *rows, REST))


def test_all_replicas_must_be_up() -> None:
    one, two = REPLICA.format(1, "UP"), REPLICA.format(2, "UP 1/2")
    with stats(page(STAND_IN), page(one, STAND_IN), page(one, two, STAND_IN)) as port:
        wait_for_replicas(port, "grpc-concertina", 2, 20.0)


@pytest.mark.parametrize("rows", [(), (STAND_IN,), (REPLICA.format(1, "DOWN"), STAND_IN)])
def test_a_stand_in_is_no_replica(rows: tuple[str, ...]) -> None:
    with stats(page(*rows)) as port, pytest.raises(TimeoutError, match="reaches 0 of 1"):
        wait_for_replicas(port, "grpc-concertina", 1, 0.3)


def test_no_haproxy_at_all() -> None:
    (port,) = free_ports(1)
    with pytest.raises(TimeoutError, match="reaches 0 of 1"):
        wait_for_replicas(port, "grpc-concertina", 1, 0.3)

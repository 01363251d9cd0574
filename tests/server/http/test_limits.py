"""What a gateway takes of a caller that is slow, and of a port that is taken."""

from __future__ import annotations

import socket
import threading
from contextlib import closing

import pytest

from server.http import process
from server.http.settings import GatewaySettings
from server.ops.ports import PortTaken
from tests.concertina.conftest import WAIT, Fake
from tests.server.http.gateways import Front, fronting

PART = 64 * 1024
PARTS = 400  # 25 MiB: more than lies between a gateway and a reader that does not read


def _send(front: Front, body: bytes, length: int) -> socket.socket:
    """A call whose body has this length, of which these bytes are sent."""
    connection = socket.create_connection(("127.0.0.1", front.port), timeout=WAIT)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_reader_that_takes_nothing_loses_its_stream(fake: Fake) -> None:
    texts = [fake.text(2 + at, at * PART, "x" * PART) for at in range(PARTS)]
    fake.script = [fake.accepted(), *texts, fake.never]
    body = b'{"model": "prose", "prompt": "a", "stream": true}'
    with (
        fronting(fake.address, slow_reader_seconds=1.0) as front,
        closing(_send(front, body, len(body))) as stalled,
    ):
        assert stalled.recv(1)
        assert fake.cancelled.wait(WAIT)


def test_a_reader_that_is_slow_but_takes_something_keeps_it(fake: Fake) -> None:
    texts = [fake.text(2 + at, at * PART, "x" * PART) for at in range(100)]
    fake.script = [fake.accepted(), *texts, fake.finished(102)]
    body = b'{"model": "prose", "prompt": "a", "stream": true}'
    with (
        fronting(fake.address, slow_reader_seconds=30.0) as front,
        closing(_send(front, body, len(body))) as slow,
    ):
        threading.Event().wait(2)
        read = bytearray()
        while b"[DONE]" not in read[-100:]:
            part = slow.recv(1 << 20)
            assert part
            read += part
    assert not fake.cancelled.is_set()


def test_a_body_has_to_arrive(fake: Fake) -> None:
    with (
        fronting(fake.address, body_seconds=0.5) as front,
        closing(_send(front, b"{", 100)) as waiting,
    ):
        assert waiting.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert fake.requests == []


@pytest.mark.parametrize(("with_parent", "option"), [(False, "--port"), (True, "--http-port")])
def test_a_taken_port_names_the_option(with_parent: bool, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = GatewaySettings("127.0.0.1:1", port=port, with_parent=with_parent)
        with pytest.raises(PortTaken, match=f"{port} on .* with {option}$"):
            process.serve(settings, lambda: None)

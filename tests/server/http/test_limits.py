"""What a gateway takes of a caller: how much, how many at a time, and how slowly."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import psutil
import pytest

from server.http import connection, process, upstream
from server.http.settings import GatewaySettings
from server.ops.ports import PortTaken
from tests.concertina.conftest import WAIT, Fake
from tests.e2e.servers import until
from tests.server.http.gateways import Front, fronting

PART = 64 * 1024
PARTS = 400  # 25 MiB: more than lies between a gateway and a reader that does not read


HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PROSE = {"model": "prose", "prompt": "a"}


def _connected(front: Front) -> socket.socket:
    return socket.create_connection(("127.0.0.1", front.port), timeout=WAIT)


def _send(front: Front, body: bytes, length: int) -> socket.socket:
    """A call whose body has this length, of which these bytes are sent."""
    calling = _connected(front)
    calling.sendall(f"{HEAD}Content-Length: {length}\r\n\r\n".encode() + body)
    return calling


def _read(calling: socket.socket) -> bytes:
    """All that is said until the end of the connection."""
    said = bytearray()
    with suppress(ConnectionResetError):
        while part := calling.recv(1 << 16):
            said += part
    return bytes(said)


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


@pytest.mark.parametrize("is_chunked", [False, True])
def test_too_large_a_body(is_chunked: bool, fake: Fake) -> None:
    """Whether or not it says beforehand how large it is."""
    fits = json.dumps(PROSE).encode().ljust(2000)
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.finished(3)]
    with fronting(fake.address, max_body_bytes=2000) as front:
        for body, status in ((fits, 200), (fits + b" ", 413)):
            asked = len(fake.requests)
            sent = iter([body[:1500], body[1500:]]) if is_chunked else body
            call = http.client.HTTPConnection("127.0.0.1", front.port, timeout=WAIT)
            call.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
            answer = call.getresponse()
            said = answer.read()
            call.close()
            assert answer.status == status, said
            assert len(fake.requests) - asked == (status == 200)
        assert json.loads(said)["error"]["message"].startswith("the body has more than 2,000 bytes")


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_calls_of_a_key(stream: bool, fake: Fake) -> None:
    """Others are served meanwhile, and the key again once a call has ended."""
    fake.script = [fake.accepted(), fake.never, fake.text(2, 0, "ab"), fake.finished(3)]
    first = {"Authorization": "Bearer first-key-first-key"}
    with fronting(fake.address, streams_per_key=2) as front, ThreadPoolExecutor() as pool:
        body = PROSE | {"stream": stream}
        open_calls = [pool.submit(front.post, "/v1/completions", body, **first) for _ in range(2)]
        while len(fake.requests) < 2:
            threading.Event().wait(0.02)
        reply = front.post("/v1/completions", body, **first)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert reply.headers["retry-after-ms"] == "1000"
        assert "2 calls with this key" in reply.error["message"]
        assert front.call("GET", "/v1/models").status == 200
        fake.never.set()
        assert [each.result(WAIT).status for each in open_calls] == [200, 200]
        assert front.post("/v1/completions", body, **first).status == 200
    assert len(fake.requests) == 3


def test_keys_that_come_and_go_leave_few_connections(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "most_connections", 4)
    port = int(fake.address.rpartition(":")[2])

    def connections() -> int:
        mine = psutil.Process().net_connections("tcp")
        here = [each for each in mine if each.raddr and each.raddr.port == port]
        return sum(each.status == psutil.CONN_ESTABLISHED for each in here)

    with fronting(fake.address) as front:
        for number in range(12):
            key = {"Authorization": f"Bearer key-{number:020}"}
            assert front.call("GET", "/v1/models", **key).status == 200
            assert connections() >= min(number + 1, 4)
        until(lambda: connections() == 4)


def test_too_large_a_head(fake: Fake) -> None:
    """In one field or in many, whatever the parser keeps of it."""
    many = "".join(f"X-{n}: {'a' * 1000}\r\n" for n in range(2000))
    with fronting(fake.address) as front:
        for fields in (many, "X: " + "a" * 2_000_000):
            with closing(_connected(front)) as calling:
                with suppress(ConnectionError):
                    calling.sendall((HEAD + fields).encode())
                said = _read(calling)
            assert not said or said.startswith(b"HTTP/1.1 400 ")
        assert front.call("GET", "/version", X_Long="a" * 60_000).status == 200
    assert fake.requests == []


@pytest.mark.parametrize("sent", ["", HEAD], ids=["nothing", "half"])
def test_a_head_has_to_arrive(sent: str, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "head_seconds", 0.5)
    with fronting(fake.address) as front, closing(_connected(front)) as waiting:
        waiting.sendall(sent.encode())
        assert _read(waiting) == b""


def test_a_call_may_take_longer_than_its_head(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the next head, of which a part is there, waits behind it."""
    monkeypatch.setattr(connection, "head_seconds", 0.3)
    fake.script = [fake.accepted(), fake.never, fake.text(2, 0, "ab"), fake.finished(3)]
    body = json.dumps(PROSE).encode()
    with fronting(fake.address) as front, closing(_send(front, body, len(body))) as waiting:
        waiting.sendall(HEAD.encode())
        threading.Event().wait(1.5)
        fake.never.set()
        assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_streams_have_their_time_to_end(fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.never]
    replies = []
    with fronting(fake.address, drain_seconds=1) as front:
        body = PROSE | {"stream": True}
        asking = threading.Thread(
            target=lambda: replies.append(front.post("/v1/completions", body))
        )
        asking.start()
        while not fake.requests:
            threading.Event().wait(0.02)
    asking.join(WAIT)
    (reply,) = replies
    assert not reply.is_whole
    assert "shuts down" in reply.events[-1]["error"]["message"]
    assert fake.cancelled.wait(WAIT)


@pytest.mark.parametrize(("with_parent", "option"), [(False, "--port"), (True, "--http-port")])
def test_a_taken_port_names_the_option(with_parent: bool, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = GatewaySettings("127.0.0.1:1", port=port, with_parent=with_parent)
        with pytest.raises(PortTaken, match=f"{port} on .* with {option}$"):
            process.serve(settings, lambda: None)

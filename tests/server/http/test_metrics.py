"""What a gateway tells Prometheus."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.concertina.conftest import WAIT, Fake
from tests.server.http.gateways import Front

PATH = "/v1/completions"
PROSE = {"model": "prose", "prompt": "a"}
STREAM = PROSE | {"stream": True}
FIRST_BYTE = "concertina_http_time_to_first_byte_seconds"


def _read(front: Front, name: str, **labels: str) -> float:
    page = front.call("GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    return sum(
        sample.value
        for family in text_string_to_metric_families(page.raw.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def _until(front: Front, value: float, name: str, **labels: str) -> None:
    for _ in range(round(WAIT / 0.05)):
        if _read(front, name, **labels) == value:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{name} is {_read(front, name, **labels)}, not {value}")


@pytest.mark.parametrize(
    ("method", "path", "body", "route", "status"),
    [
        ("POST", PATH, PROSE, PATH, "200"),
        ("POST", PATH, PROSE | {"stream": True}, PATH, "200"),
        ("POST", PATH, PROSE | {"n": 0.5}, PATH, "400"),
        ("POST", PATH, b"{", PATH, "400"),
        ("GET", "/v1/models/prose", None, "/v1/models/{model:path}", "200"),
        ("GET", "/v1/models/no/such", None, "/v1/models/{model:path}", "404"),
        ("GET", "/v1/what/ever", None, "other", "404"),
        ("DELETE", PATH, None, "other", "405"),
        ("POST", "/v1/responses", {}, "/v1/responses", "404"),
    ],
)
def test_requests_are_counted_by_route_and_status(
    method: str, path: str, body: object, route: str, status: str, told: Front, fake: Fake
) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.finished(3)]
    name, labels = "concertina_http_requests_total", {"route": route, "status": status}
    before, all_before = _read(told, name, **labels), _read(told, name)
    assert told.call(method, path, body).status == int(status)
    _until(told, before + 1, name, **labels)
    # And those of the page of metrics itself.
    assert _read(told, name) - _read(told, name, route="/metrics") <= all_before + 1


def test_what_is_open_is_shown_while_it_is(told: Front, fake: Fake) -> None:
    fake.script = [fake.accepted(), fake.never, fake.text(2, 0, "ab"), fake.finished(3)]
    with ThreadPoolExecutor() as pool:
        stream, whole = (pool.submit(told.post, PATH, body) for body in (STREAM, PROSE))
        _until(told, 1, "concertina_http_streams_open")
        _until(told, 3, "concertina_http_requests_open")
        fake.never.set()
        assert stream.result(WAIT).status == whole.result(WAIT).status == 200
    _until(told, 0, "concertina_http_streams_open")
    _until(told, 1, "concertina_http_requests_open")


@pytest.mark.parametrize("body", [STREAM, PROSE], ids=["stream", "whole"])
def test_the_first_byte_is_none_of_a_comment(
    body: dict[str, object], told: Front, fake: Fake
) -> None:
    fake.script = [fake.accepted(), fake.never, fake.text(2, 0, "ab"), fake.finished(3)]
    count, total = (_read(told, f"{FIRST_BYTE}_{part}", route=PATH) for part in ("count", "sum"))
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(told.post, PATH, body)
        while not fake.requests:
            threading.Event().wait(0.02)
        threading.Event().wait(1.0)
        fake.never.set()
        reply = answer.result(WAIT)
    assert reply.raw.startswith(b"\n\n") == (body is STREAM)
    _until(told, count + 1, f"{FIRST_BYTE}_count", route=PATH)
    assert _read(told, f"{FIRST_BYTE}_sum", route=PATH) - total >= 1.0


def test_streams_that_were_cut_are_counted(told: Front, fake: Fake) -> None:
    name = "concertina_http_streams_cut_total"
    before = _read(told, name, route=PATH)
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.finished(3)]
    assert told.post(PATH, STREAM).is_whole
    assert _read(told, name, route=PATH) == before
    fake.script = [fake.accepted(), fake.text(2, 0, "ab"), fake.error(3)]
    assert not told.post(PATH, STREAM).is_whole
    _until(told, before + 1, name, route=PATH)

"""OpenAI's HTTP API of a server, in both homes: also after its gateway was killed."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import psutil

from concertina.client import Client
from tests.e2e.servers import Server, until

WAIT = 120.0
BODY = {"model": "long-text", "prompt": "a", "max_tokens": 20, "seed": 7}


def _completed(server: Server) -> str:
    request = urllib.request.Request(
        f"http://{server.http_address}/v1/completions",
        json.dumps(BODY).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        body: Any = json.loads(answer.read())
    text: str = body["choices"][0]["text"]
    return text


def _gateways(server: Server) -> list[psutil.Process]:
    children = server.process.children()
    return [each for each in children if "gateway" in each.cmdline()]


def test_it_answers_as_the_grpc_services_do(server: Server, client: Client) -> None:
    said = client.complete("a", model="long-text", max_tokens=20, seed=7).text
    assert _completed(server) == said


def test_a_killed_gateway_is_replaced(server: Server) -> None:
    before = _completed(server)
    (killed,) = _gateways(server)
    killed.kill()
    killed.wait(WAIT)

    def answers() -> bool:
        try:
            return _completed(server) == before
        except (urllib.error.URLError, ConnectionError):
            return False

    until(answers, WAIT)
    (another,) = _gateways(server)
    assert another.pid != killed.pid
    assert "has ended (signal 9): starting it again" in server.output()

"""Gateways in a thread of their own, over a real server or over one that says what it is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from server.api.servicers import make_servicers
from server.config import EngineConfig, ServeConfig
from server.hosts.local import make_server
from server.http import process
from server.http.settings import GatewaySettings
from server.ops.ports import free_ports
from server.sessions.served_model import serve_bundles

WAIT = 60.0
TEMPLATE = "{% for each in messages %}{{ each.role[0] }}{{ each.content }}{% endfor %}"


@dataclass(frozen=True)
class Reply:
    """What a gateway answered. is_whole: whether the connection was not cut."""

    status: int
    headers: Mapping[str, str]
    raw: bytes
    is_whole: bool = True

    @property
    def json(self) -> Any:
        """The object that it is."""
        return json.loads(self.raw)

    @property
    def error(self) -> Any:
        """The error that it tells of."""
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The objects of its events; `[DONE]` is a string."""
        lines = [line for line in self.raw.decode().split("\n") if line.startswith("data: ")]
        told = [line.removeprefix("data: ") for line in lines]
        return [each if each == "[DONE]" else json.loads(each) for each in told]

    @property
    def text(self) -> str:
        """The text of all events."""
        choices = [each["choices"] for each in self.events if "choices" in each]
        return "".join(
            each[0].get("text") or each[0].get("delta", {}).get("content") or ""
            for each in choices
            if each
        )


@dataclass(frozen=True)
class Front:
    """A running gateway. upstream: address of the server behind it."""

    port: int
    upstream: str

    def call(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """What it answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        sent = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, sent)
            answer = connection.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            try:
                return Reply(answer.status, told, answer.read())
            except http.client.IncompleteRead as cut:
                return Reply(answer.status, told, cut.partial, is_whole=False)
        finally:
            connection.close()

    def post(self, path: str, body: object, **headers: str) -> Reply:
        """What it answers to a body."""
        return self.call("POST", path, body, **headers)


@contextmanager
def fronting(upstream: str, **settings: Any) -> Iterator[Front]:
    """A gateway to this server."""
    (port,) = free_ports(1)
    chosen = GatewaySettings(upstream, **{"port": port, "drain_seconds": 1} | settings)
    server = uvicorn.Server(process.configuration(chosen))
    thread = threading.Thread(target=server.run, args=([process.listening(chosen)],))
    thread.start()
    try:
        for _ in range(round(WAIT / 0.05)):
            if server.started:
                break
            threading.Event().wait(0.05)
        assert server.started
        yield Front(port, upstream)
    finally:
        server.should_exit = True
        thread.join(WAIT)
    assert not thread.is_alive()


@contextmanager
def serving(*bundles: Path, keys: Path | None = None) -> Iterator[str]:
    """A real server of these bundles, without a process of its own; its address."""
    (port,) = free_ports(1)
    engine = EngineConfig(threads=1, slots=4, queue_limit=8, chat_template=TEMPLATE)
    config = ServeConfig(bundles, port=port, metrics_port=0, keys=keys, engine=engine)
    started, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def run() -> None:
        models = serve_bundles(config.bundles, config.engine, None)
        server = make_server(config, make_servicers(config.keys, models))
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(None)
        for model in models.values():
            model.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert started.wait(WAIT)
        yield config.address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT)
        loop.close()
    assert not thread.is_alive()

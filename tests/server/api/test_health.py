from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.api.health import SERVICES, HealthServicer, is_serving, wait_until_serving
from server.ops.ports import free_ports

Response = health_pb2.HealthCheckResponse


@dataclass
class Engine:
    alive: bool = True


@dataclass
class HealthServer:
    engines: dict[str, Any]
    address: str


@pytest.fixture
async def server() -> AsyncIterator[HealthServer]:
    """A grpc.aio server with only the health service, over two engines."""
    engines: dict[str, Any] = {"a": Engine(), "b": Engine()}
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(engines), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield HealthServer(engines, f"127.0.0.1:{port}")
    await server.stop(None)


async def check(server: HealthServer, service: str = "") -> Any:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)).status


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_one_dead_engine_is_enough(server: HealthServer, service: str) -> None:
    assert await check(server, service) == Response.SERVING
    server.engines["b"].alive = False
    assert await check(server, service) == Response.NOT_SERVING
    assert not await asyncio.to_thread(is_serving, server.address)


async def test_an_unknown_service_is_not_found(server: HealthServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await check(server, "nope")
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert "concertina.v1.GenerationService" in str(raised.value.details())


async def test_watch_reports_changes(server: HealthServer) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert (await watch.read()).status == Response.SERVING
        server.engines["a"].alive = False
        assert (await watch.read()).status == Response.NOT_SERVING


async def test_a_watch_ends(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.health.watch_limit_seconds", 0.5)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert [answer.status async for answer in watch] == [Response.SERVING]
        assert await watch.code() == grpc.StatusCode.OK


async def test_only_so_many_watch(server: HealthServer) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        def watch() -> Any:
            return stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)

        watches = [watch() for _ in range(64)]
        for each in watches:
            assert (await each.read()).status == Response.SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="64 callers watch already") as raised:
            await watch().read()
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await check(server) == Response.SERVING  # which is for everyone, always
        for each in watches[:8]:
            each.cancel()
        async with asyncio.timeout(10):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    watches.append(watch())
                    assert (await watches[-1].read()).status == Response.SERVING
                    break
                await asyncio.sleep(0.05)
        for each in watches:
            each.cancel()


async def test_waiting_ends_when_a_server_answers(server: HealthServer) -> None:
    await asyncio.to_thread(wait_until_serving, server.address, 10.0)


def test_waiting_without_a_server_times_out() -> None:
    (port,) = free_ports(1)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"no healthy server answers at 127.0.0.1:{port}"):
        wait_until_serving(f"127.0.0.1:{port}", 0.5)
    assert time.monotonic() - began < 10


def test_a_server_that_never_answers_is_not_serving() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not is_serving(f"127.0.0.1:{silent.getsockname()[1]}")

"""The parts of the Ray host that need no cluster; tests/e2e has the rest."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import model_service_pb2 as model_pb
from server.api.wire import add_generation
from server.errors import InvalidRequest
from server.hosts.ray_environment import GRPC_HOST, REQUEST_BYTES
from server.ops.ports import free_ports

app: Any = pytest.importorskip("server.hosts.ray_app")


def replica(**parts: object) -> Any:
    """A replica that has only these parts."""
    found = object.__new__(app.Replica)
    vars(found).update(served={}, watcher=None, snapshots=None, **parts)
    return found


class Refusing:
    """A servicer that refuses every call: it sets a status and returns None."""

    async def refuse(self, request: object, context: Any) -> None:
        context.set_code(grpc.StatusCode.NOT_FOUND)

    Score = GetModel = refuse


def test_a_dead_engine_makes_a_replica_unhealthy() -> None:
    ours = replica()
    ours.served = {"a": SimpleNamespace(alive=True, close=lambda: None)}
    ours.check_health()
    ours.served["b"] = SimpleNamespace(alive=False, close=lambda: None)
    with pytest.raises(RuntimeError, match="the engine of b has died"):
        ours.check_health()


async def test_ray_gets_a_response_even_for_a_refused_call() -> None:
    ours, codes = replica(generation=Refusing(), models=Refusing()), []
    context: Any = SimpleNamespace(set_code=codes.append)
    assert await ours.Score(pb.ScoreRequest(), context) == pb.ScoreResponse()
    assert await ours.GetModel(model_pb.GetModelRequest(), context) == model_pb.GetModelResponse()
    assert codes == [grpc.StatusCode.NOT_FOUND] * 2


@pytest.fixture
def add_address(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The patched method that opens the port of a gRPC server in Ray's processes."""
    from ray.serve._private import default_impl, grpc_util
    from ray.serve._private import replica as replica_module

    monkeypatch.setattr(default_impl, "add_grpc_address", default_impl.add_grpc_address)
    opens = replica_module.add_port_to_grpc_server
    monkeypatch.setattr(replica_module, "add_port_to_grpc_server", opens)
    monkeypatch.setenv(GRPC_HOST, "127.0.0.1")
    monkeypatch.setenv(REQUEST_BYTES, "4194304")
    monkeypatch.setattr(
        grpc_util, "DEFAULT_GRPC_SERVER_OPTIONS", [*grpc_util.DEFAULT_GRPC_SERVER_OPTIONS]
    )
    assert app.bind_grpc_to_host() == []
    return default_impl.add_grpc_address


def test_ray_opens_its_port_on_our_address(add_address: Any) -> None:
    (port,) = free_ports(1)
    opened: list[str] = []
    add_address(SimpleNamespace(add_insecure_port=opened.append), f"[::]:{port}")
    assert opened == [f"127.0.0.1:{port}"]


async def test_ray_receives_what_we_do(add_address: Any) -> None:
    """What is too large for gRPC never arrives; what is too large for us arrives as an error."""
    from ray.serve._private.grpc_util import gRPCGenericServer

    received: list[object] = []

    async def handle(request: object, context: object) -> bytes:
        received.append(request)
        return b""

    server = gRPCGenericServer(lambda **_: handle)
    add_generation(Mock(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            score: Any = channel.unary_unary("/concertina.v1.GenerationService/Score")
            for size in (10, 4_000_000):
                asked = pb.ScoreRequest(prompt=pb.Prompt(text="x" * size))
                await score(asked.SerializeToString())
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await score(bytes(4 * 1024 * 1024 + 1))
    finally:
        await server.stop(None)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    fine, refused = received
    assert isinstance(fine, pb.ScoreRequest) and len(fine.prompt.text) == 10
    assert isinstance(refused, InvalidRequest) and refused.field == "prompt.text"


def test_the_second_port_of_a_replica_is_on_loopback(add_address: Any) -> None:
    from ray.serve._private import replica as replica_module

    opened: list[str] = []

    def add(address: str) -> int:
        opened.append(address)
        return 9

    server = SimpleNamespace(add_insecure_port=add)
    assert replica_module.add_port_to_grpc_server(server, "[::]:0") == 9
    assert opened == ["127.0.0.1:0"]


def test_a_port_of_another_server_is_not_shared(add_address: Any) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        # RuntimeError is what makes Ray Serve try the next port.
        with pytest.raises(RuntimeError, match="is taken"):
            add_address(None, f"[::]:{other.getsockname()[1]}")

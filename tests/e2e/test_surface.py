"""What else answers on the ports of a server: health, reflection, metrics, and nobody uninvited."""

from __future__ import annotations

from contextlib import suppress

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from concertina.addresses import is_loopback
from tests.e2e.servers import Server

SERVING = health_pb2.HealthCheckResponse.SERVING


def test_health(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "concertina.v1.GenerationService", "concertina.v1.ModelService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=10).status == SERVING
        with pytest.raises(grpc.RpcError) as raised:
            stub.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=10)
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watch).status == SERVING
        watch.cancel()


def test_reflection(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    ours = {"concertina.v1.GenerationService", "concertina.v1.ModelService"}
    assert ours | {"grpc.health.v1.Health"} <= services


def test_metrics(server: Server) -> None:
    assert server.metric("concertina_process_resident_memory_bytes") > 10_000_000
    assert server.metric("concertina_state_buffer_bytes") > 0


def test_every_port_is_on_loopback(server: Server) -> None:
    """As `ss -tln` shows it: the server's own ports, and those of Ray and of HAProxy."""
    listening = []
    for process in [server.process, *server.process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # Ray starts some that end soon
            listening += [
                (process.name(), connection.laddr)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
    assert len(listening) >= 2
    for name, address in listening:
        assert is_loopback(address.ip.removeprefix("::ffff:")), (name, address)

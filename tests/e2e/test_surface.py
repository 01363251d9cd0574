"""What else answers on the ports of a server: health, reflection, metrics, and nobody uninvited."""

from __future__ import annotations

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from concertina.v1 import model_service_pb2, model_service_pb2_grpc
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


def test_models_are_served_on_loopback_only(server: Server) -> None:
    """Three of Ray's ports cannot be moved: two pages of HAProxy about itself, and one of a replica
    that wants a token. None of them may serve our models.
    """
    processes = [server.process, *server.process.children(recursive=True)]
    ports = {
        connection.laddr.port: process.name().split(":")[0]
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith("127.")
    }
    assert sorted(ports.values()) in ([], ["haproxy", "haproxy", "ray"])
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            with pytest.raises(grpc.RpcError):
                stub.ListModels(model_service_pb2.ListModelsRequest(), timeout=5)

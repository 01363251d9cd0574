"""grpc.health.v1: the server is serving while all engines run, also if there are none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from concertina.client.channel import channel_options
from concertina.v1 import generation_service_pb2, model_service_pb2, session_service_pb2
from server.api.context import Context
from server.sessions.served_model import ServedModel

SERVICES: Final = (
    generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    session_service_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
)
_WATCH_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 0.1
# Who watches needs no key, so there is a bound on how many do, and for how long.
_MOST_WATCHES: Final = 64
watch_limit_seconds = 10 * 60.0

_Response = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Reports the health of the server (empty name) and of each service."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models
        self._watches = 0

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The status now."""
        status = self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"service must be empty or one of {', '.join(SERVICES)}")
        return _Response(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now, then each change of it, for ten minutes; then the caller asks again."""
        if self._watches >= _MOST_WATCHES:
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(f"{_MOST_WATCHES} callers watch already: use Check, or try later")
            return
        self._watches += 1
        try:
            last, until = None, time.monotonic() + watch_limit_seconds
            while time.monotonic() < until:
                if (status := self._status(request.service)) != last:
                    yield _Response(status=status)
                last = status
                await asyncio.sleep(_WATCH_SECONDS)
        finally:
            self._watches -= 1

    def _status(self, service: str) -> int:
        if service and service not in SERVICES:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if all_alive(self._models) else _Response.NOT_SERVING


def all_alive(models: Mapping[str, ServedModel]) -> bool:
    """Whether all engines run."""
    return all(model.alive for model in list(models.values()))  # another thread may change them


def is_serving(address: str) -> bool:
    """Whether a healthy server answers at `address` within a second."""
    with grpc.insecure_channel(address, options=channel_options(address)) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            response = check(health_pb2.HealthCheckRequest(), timeout=1.0, wait_for_ready=True)
        except grpc.RpcError:
            return False
    return bool(response.status == _Response.SERVING)


def wait_until_serving(address: str, limit_s: float) -> None:
    """Wait until a healthy server answers. Raises TimeoutError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not is_serving(address):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no healthy server answers at {address} after {limit_s:.0f} s")
        time.sleep(_RETRY_SECONDS)

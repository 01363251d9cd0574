"""Every call is counted once, by its method and its status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from prometheus_client import REGISTRY

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import session_service_pb2 as session_pb
from server.api.servicers import Servicers, make_servicers
from server.auth.api_keys import Caller, new_key, write_keys
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.sessions.served_model import ServedModel
from tests.server.api.test_sessions import Context
from tests.server.engines import Gate, until

FILES = (pb.DESCRIPTOR, session_pb.DESCRIPTOR, model_pb.DESCRIPTOR)
METHODS = {
    method.name: (service.name, method)
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}


def count(method: str, status: str) -> float | None:
    labels = {"method": method, "status": status}
    return REGISTRY.get_sample_value("concertina_calls_total", labels)


def all_counts() -> dict[tuple[str, str], float]:
    (family,) = (each for each in REGISTRY.collect() if each.name == "concertina_calls")
    return {
        (sample.labels["method"], sample.labels["status"]): sample.value
        for sample in family.samples
    }


def grown(before: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return {
        key: value - before.get(key, 0)
        for key, value in all_counts().items()
        if value != before.get(key, 0)
    }


@pytest.fixture
def model(text: Bundle) -> Iterator[ServedModel]:
    served = ServedModel(text, EngineConfig(threads=1))
    yield served
    served.close()


def handler(servicers: Servicers, method: str) -> Any:
    room = {
        "GenerationService": servicers.generation,
        "SessionService": servicers.sessions,
        "ModelService": servicers.models,
    }
    return getattr(room[METHODS[method][0]], method)


async def call(servicers: Servicers, method: str, request: Any) -> None:
    answer = handler(servicers, method)(request, Context())
    if hasattr(answer, "__aiter__"):
        async for _ in answer:
            pass
    else:
        await answer


async def requests(descriptor: MethodDescriptor) -> Any:
    yield GetMessageClass(descriptor.input_type)()


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_counts_those_that_nobody_knows(method: str, tmp_path: Path) -> None:
    assert count(method, "OK") is not None  # from the start
    keys = tmp_path / "keys.json"
    write_keys(keys, [new_key(Caller("alice"))[0]])
    servicers, before = make_servicers(keys, {}), all_counts()
    descriptor = METHODS[method][1]
    empty = GetMessageClass(descriptor.input_type)()
    is_stream = method == "Import"
    await call(servicers, method, requests(descriptor) if is_stream else empty)
    assert grown(before) == {(method, "UNAUTHENTICATED"): 1}


async def test_calls_count_by_how_they_end(model: ServedModel) -> None:
    servicers, name = make_servicers(None, {model.bundle.name: model}), model.bundle.name
    before = all_counts()
    await call(servicers, "GetModel", model_pb.GetModelRequest())
    await call(servicers, "GetModel", model_pb.GetModelRequest(model="none"))
    asked = pb.GenerateRequest(model=name)
    asked.stopping.max_tokens = 3
    await call(servicers, "Generate", asked)
    asked.stopping.max_tokens = 10**6
    await call(servicers, "Generate", asked)
    assert grown(before) == {
        ("GetModel", "OK"): 1,
        ("GetModel", "NOT_FOUND"): 1,
        ("Generate", "OK"): 1,
        ("Generate", "INVALID_ARGUMENT"): 1,
    }


@pytest.mark.parametrize("closes", [True, False])
async def test_a_caller_that_goes_away_has_cancelled(model: ServedModel, closes: bool) -> None:
    servicers, before = make_servicers(None, {model.bundle.name: model}), all_counts()

    async def read(first: asyncio.Event) -> None:
        answer = handler(servicers, "Generate")(pb.GenerateRequest(), Context())
        async with aclosing(answer) as events:
            async for _ in events:
                first.set()
                if closes:
                    return

    with Gate(model) as gate:
        first = asyncio.Event()
        reading = asyncio.create_task(read(first))
        await first.wait()
        if not closes:
            reading.cancel()
        await asyncio.wait([reading])
        gate.let(float("inf"))
    assert grown(before) == {("Generate", "CANCELLED"): 1}
    await until(lambda: model.is_empty)

"""A server as `concertina serve --local` makes it: keys, quotas and limits."""

from __future__ import annotations

import asyncio
import logging
import pkgutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from concertina import v1
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.api.servicers import make_servicers
from server.auth.api_keys import Caller, new_key, write_keys
from server.config import MEBIBYTE, EngineConfig, ServeConfig
from server.hosts.local import make_server
from server.ops.ports import free_ports
from server.sessions.served_model import ServedModel, serve_bundles
from tests.certificates import Certificates
from tests.server.engines import LIMIT_S, Gate, is_empty, script, until

TEXT, IMAGE = "tiny-text", "tiny-image"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@dataclass(frozen=True)
class Served:
    """A running server."""

    config: ServeConfig
    engines: dict[str, ServedModel]


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture(scope="module")
def engines(text_bundle: Path, image_bundle: Path) -> Any:
    opened = serve_bundles([text_bundle, image_bundle], EngineConfig(threads=1))
    yield opened
    for model in opened.values():
        model.close()


@pytest.fixture
async def serve(engines: dict[str, ServedModel], text_bundle: Path) -> AsyncIterator[Serve]:
    """Starts servers with these settings; in the end no engine may hold anything."""
    servers: list[grpc.aio.Server] = []

    async def serve(**settings: Any) -> Served:
        (port,) = free_ports(1)
        config = replace(ServeConfig((text_bundle,), port=port), **settings)
        servers.append(make_server(config, make_servicers(config.keys, engines)))
        await servers[-1].start()
        return Served(config, engines)

    yield serve
    for server in servers:
        await server.stop(None)
    await until(lambda: all(is_empty(model) for model in engines.values()), limit_s=10)


class Calls:
    """Every call of the API, with one key or none."""

    def __init__(self, channel: grpc.aio.Channel, secret: str | None) -> None:
        self._sent: Any = {"timeout": LIMIT_S}
        if secret is not None:
            self._sent["metadata"] = (("authorization", f"Bearer {secret}"),)
        self._generation: Any = generation_grpc.GenerationServiceStub(channel)
        self._models: Any = model_grpc.ModelServiceStub(channel)

    def stream(self, model: str = "", outputs: int = 1, tokens: int = 4) -> Any:
        stopping = pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True)
        options = pb.OutputOptions(n=outputs)
        request = pb.GenerateRequest(model=model, stopping=stopping, output=options)
        return self.send(request)

    def send(self, request: pb.GenerateRequest) -> Any:
        return self._generation.Generate(request, **self._sent)

    async def generate(self, model: str = "", outputs: int = 1) -> str:
        """Name of the model that generated."""
        events = [event async for event in self.stream(model, outputs)]
        assert events[-1].HasField("finished")
        return str(events[0].accepted.model)

    async def score(self, model: str = "") -> str:
        request = pb.ScoreRequest(model=model, prompt=pb.Prompt(tokens=pb.TokenIds(ids=[1, 2])))
        return str((await self._generation.Score(request, **self._sent)).model)

    async def models(self) -> list[str]:
        response = await self._models.ListModels(model_pb.ListModelsRequest(), **self._sent)
        return [model.manifest.name for model in response.models]

    async def model(self, model: str = "") -> str:
        response = await self._models.GetModel(model_pb.GetModelRequest(model=model), **self._sent)
        return str(response.model.manifest.name)


async def refusal(call: Awaitable[object]) -> tuple[str, str]:
    """Status and message of a call that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code().name, str(raised.value.details())


async def eventually(call: Callable[[], Awaitable[str]]) -> str:
    """The answer of a call, once the server has noticed that streams have ended."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            await asyncio.sleep(0.01)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Calls]]:
    """Calls of a server without TLS."""
    channels: list[grpc.aio.Channel] = []

    def connect(served: Served, secret: str | None = None) -> Calls:
        channels.append(grpc.aio.insecure_channel(served.config.address))
        return Calls(channels[-1], secret)

    yield connect
    for channel in channels:
        await channel.close()


@pytest.fixture
def keys(tmp_path: Path) -> Any:
    """Writes a file with a key for each caller: its path, then their secrets."""

    def write(*callers: Caller) -> list[Any]:
        made = [new_key(caller) for caller in callers]
        write_keys(tmp_path / "keys.json", [key for key, _ in made])
        return [tmp_path / "keys.json", *(secret for _, secret in made)]

    return write


async def test_every_call_needs_a_key(serve: Serve, connect: Any, keys: Any) -> None:
    path, secret = keys(Caller("writer"))
    served = await serve(keys=path)
    for stranger in (connect(served), connect(served, "concertina-" + "x" * 43)):
        for call in (stranger.generate, stranger.score, stranger.models, stranger.model):
            assert (await refusal(call()))[0] == "UNAUTHENTICATED"
    friend = connect(served, secret)
    assert await friend.generate(TEXT) == await friend.score(TEXT) == TEXT
    assert await friend.models() == [IMAGE, TEXT]
    assert await friend.model(IMAGE) == IMAGE


async def test_no_call_is_forgotten(serve: Serve, keys: Any) -> None:
    """Whatever our services offer, now or later: without a key it is refused."""
    path, _ = keys(Caller("writer"))
    served = await serve(keys=path)
    async with grpc.aio.insecure_channel(served.config.address) as channel:
        contracts = [each.name for each in pkgutil.iter_modules(v1.__path__, f"{v1.__name__}.")]
        methods = [
            f"/{service.full_name}/{method.name}"
            for name in contracts
            if name.endswith("_service_pb2")
            for service in import_module(name).DESCRIPTOR.services_by_name.values()
            for method in service.methods
        ]
        assert len(methods) >= 4
        for method in methods:
            call = channel.unary_stream(method)(b"", timeout=LIMIT_S)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in call:
                    pass
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED, method


async def test_a_key_reaches_its_models_only(serve: Serve, connect: Any, keys: Any) -> None:
    path, secret, useless = keys(Caller("reader", (TEXT,)), Caller("stale", ("gone",)))
    served = await serve(keys=path)
    reader = connect(served, secret)
    assert await reader.models() == [TEXT]
    # It needs no name, since this key has no other model.
    assert await reader.generate() == await reader.score() == await reader.model() == TEXT
    for call in (reader.generate, reader.score, reader.model):
        served_one, missing_one = [await refusal(call(name)) for name in (IMAGE, "tiny-nope")]
        assert served_one[0] == "PERMISSION_DENIED"
        # Status and message do not show which of them is served.
        assert served_one == (missing_one[0], missing_one[1].replace("tiny-nope", IMAGE))
    stale = connect(served, useless)
    assert await stale.models() == []
    for call in (stale.generate, stale.score, stale.model):
        status, details = await refusal(call())
        assert (status, TEXT in details) == ("PERMISSION_DENIED", False)
        assert (await refusal(call("gone")))[0] == "NOT_FOUND"


async def test_a_key_has_a_quota_of_streams(serve: Serve, connect: Any, keys: Any) -> None:
    path, secret, other = keys(Caller("reader", max_streams=3), Caller("writer"))
    served = await serve(keys=path)
    reader = connect(served, secret)
    with Gate(served.engines[TEXT]) as gate:
        held = [reader.stream(TEXT, outputs) for outputs in (1, 2)]
        for stream in held:
            assert (await stream.read()).HasField("accepted")
        # The quota is of the key, not of a model.
        events = reader.stream(IMAGE)
        first = await events.read()
        assert (first.error.code, first.error.retryable) == ("RESOURCE_EXHAUSTED", True)
        assert "3 streams run or wait" in first.error.message
        assert first.error.HasField("retry_after")
        assert await events.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await refusal(reader.score(IMAGE)))[0] == "RESOURCE_EXHAUSTED"
        assert await connect(served, other).generate(IMAGE, outputs=4) == IMAGE
        held[1].cancel()

        async def generate() -> str:
            gate.let(1)  # the engine takes the cancellation between two steps
            return await reader.generate(IMAGE, outputs=2)

        assert await eventually(generate) == IMAGE
    while await held[0].read() != grpc.aio.EOF:
        pass
    assert await eventually(lambda: reader.generate(TEXT, outputs=3)) == TEXT
    status, details = await refusal(reader.generate(TEXT, outputs=4))
    assert (status, "'reader' may have 3" in details) == ("INVALID_ARGUMENT", True)


async def test_a_key_that_is_removed_opens_nothing(serve: Serve, connect: Any, keys: Any) -> None:
    path, secret = keys(Caller("writer"))
    served = await serve(keys=path)
    writer = connect(served, secret)
    assert await writer.generate(TEXT) == TEXT
    write_keys(path, [])
    assert (await refusal(writer.generate(TEXT)))[0] == "UNAUTHENTICATED"


@pytest.mark.parametrize("closed", [False, True])
async def test_health_is_for_everyone_and_reflection_is_not(
    closed: bool, serve: Serve, keys: Any
) -> None:
    served = await serve(keys=keys(Caller("writer"))[0] if closed else None)
    async with grpc.aio.insecure_channel(served.config.address) as channel:
        check: Any = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        response = await check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        call: Any = channel.stream_stream(REFLECTION)(iter([b"\x3a\x00"]), timeout=LIMIT_S)
        if closed:
            assert await call.code() == grpc.StatusCode.UNIMPLEMENTED
        else:
            assert b"concertina.v1.GenerationService" in await call.read()


async def test_messages_have_a_limit(serve: Serve, connect: Any) -> None:
    served = await serve(max_request_bytes=MEBIBYTE)
    async with grpc.aio.insecure_channel(served.config.address) as channel:
        stub: Any = generation_grpc.GenerationServiceStub(channel)
        request = pb.ScoreRequest(prompt=pb.Prompt(text="x" * MEBIBYTE))
        status, details = await refusal(stub.Score(request, timeout=LIMIT_S))
        assert status == "RESOURCE_EXHAUSTED"
        assert str(MEBIBYTE) in details and "xxx" not in details
    assert await connect(served).generate(TEXT) == TEXT


async def test_logs_metrics_and_errors_hold_nothing_of_a_stream(
    serve: Serve,
    connect: Any,
    keys: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, secret = keys(Caller("writer"))
    served = await serve(keys=path)
    runtime: Any = served.engines[TEXT].engine.runtime
    monkeypatch.setattr(runtime, "step", runtime.step)
    asked, written = b"Xanthippe asks, ", b"Zebedee writes; "
    script(served.engines[TEXT], (asked + written * 5)[:96])
    stopping = pb.StoppingCriteria(max_tokens=len(written), stop=["Zebedee sleeps"])
    request = pb.GenerateRequest(
        model=TEXT, prompt=pb.Prompt(text=asked.decode()), stopping=stopping
    )
    calls = connect(served, secret)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("server").debug("the log is being read")
        events = [event async for event in calls.send(request)]
        assert "".join(event.tokens.text for event in events).encode() == written
        monkeypatch.setattr(runtime, "step", lambda *_: 1 / 0)
        events = [event async for event in calls.send(request)]
        messages = [events[-1].error.message]
        request.stopping.stop[:] = ["Zebedee" * 1000]
        messages.append((await refusal(anext(aiter(calls.send(request)))))[1])
        request.prompt.text *= 100
        del request.stopping.stop[:]
        messages.append((await refusal(anext(aiter(calls.send(request)))))[1])
        monkeypatch.setattr("server.api.generation.generate_request", lambda *_: {}[0])
        messages.append((await refusal(anext(aiter(calls.send(request)))))[1])
    assert "the log is being read" in caplog.text and "ZeroDivisionError" in caplog.text
    assert all(messages), messages
    metrics = generate_latest().decode()
    assert f'model_name="{TEXT}"' in metrics
    output = capfd.readouterr()
    for place in (caplog.text, metrics, *messages, output.out, output.err):
        for word in (b"Xanthippe", b"Zebedee"):
            assert word.decode() not in place
            assert ", ".join(map(str, word)) not in place
        assert secret not in place


@pytest.mark.parametrize("host", ["::1", "::"])
async def test_it_listens_on_ipv6(serve: Serve, host: str) -> None:
    served = await serve(host=host)
    assert served.config.address == f"[::1]:{served.config.port}"
    async with grpc.aio.insecure_channel(served.config.address) as channel:
        assert await Calls(channel, None).models() == [IMAGE, TEXT]


async def test_a_plaintext_port_beside_tls(serve: Serve, certificates: Certificates) -> None:
    (port,) = free_ports(1)
    await serve(tls=certificates.server(mutual=True), plain_port=port)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await Calls(channel, None).models() == [IMAGE, TEXT]


async def test_a_handshake_has_an_end(
    serve: Serve, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.hosts.local.handshake_seconds", 1.0)
    served = await serve(tls=certificates.server())
    reader, writer = await asyncio.open_connection("127.0.0.1", served.config.port)
    async with asyncio.timeout(LIMIT_S / 2):
        with suppress(ConnectionResetError):
            await reader.read()
    writer.close()

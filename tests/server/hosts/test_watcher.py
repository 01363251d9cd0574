"""Bundles that come, change and go while their server answers."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.api.servicers import make_servicers
from server.bundles.bundle import load_bundle
from server.config import EngineConfig, ServeConfig
from server.hosts.local import make_server
from server.hosts.watcher import Watcher
from server.ops.ports import free_ports
from server.sessions.served_model import ServedModel
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.server.bundle_folders import damage, put
from tests.server.engines import LIMIT_S, Gate, until

TEXT, IMAGE = "tiny-text", "tiny-image"
CONFIG = EngineConfig(threads=1, slots=2, snapshot_interval=8)
SCANS_S = 0.3  # enough for many scans
SEALER = Sealer([bytes(range(32))])


@dataclass
class WatchingServer:
    """A server that watches a directory, and stubs to call it."""

    directory: Path
    watcher: Watcher
    generation: Any
    models: Any
    health: Any

    @property
    def engines(self) -> dict[str, ServedModel]:
        return self.watcher.models

    def stream(self, model: str, tokens: int = 20, **fields: Any) -> Any:
        stopping = pb.StoppingCriteria(max_tokens=tokens, ignore_eos=True)
        sampling = {"seed": 5}
        request = pb.GenerateRequest(model=model, stopping=stopping, sampling=sampling, **fields)
        return self.generation.Generate(request, timeout=LIMIT_S)

    async def generate(self, model: str) -> list[pb.GenerateResponse]:
        return [event async for event in self.stream(model)]

    async def listed(self) -> dict[str, str]:
        """Fingerprints of the models by name."""
        response = await self.models.ListModels(model_pb.ListModelsRequest(), timeout=LIMIT_S)
        return {model.manifest.name: model.manifest.fingerprint for model in response.models}

    async def serves(self, **fingerprints: str) -> None:
        """Waits until these models are listed, and no others."""
        wanted = {name.replace("_", "-"): value for name, value in fingerprints.items()}
        await until(lambda: _listed(self.engines) == wanted)
        assert await self.listed() == wanted


def _listed(engines: dict[str, ServedModel]) -> dict[str, str]:
    return {name: model.bundle.manifest.fingerprint for name, model in engines.items()}


Start = Callable[..., Awaitable[WatchingServer]]


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[SnapshotWriter]:
    writer = SnapshotWriter(Store(f"file://{tmp_path}/store"), SEALER, 60.0)
    yield writer
    writer.close(LIMIT_S)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "bundles").mkdir()
    return tmp_path / "bundles"


@pytest.fixture
async def start(directory: Path, writer: SnapshotWriter) -> AsyncIterator[Start]:
    """Starts servers of the directory. At the end, checks that none of their threads is left."""
    opened: list[tuple[Watcher, grpc.aio.Server, grpc.aio.Channel]] = []
    before = set(threading.enumerate())

    async def start(drain_seconds: int = 60) -> WatchingServer:
        (port,) = free_ports(1)
        config = ServeConfig((), directory, port=port, drain_seconds=drain_seconds, engine=CONFIG)
        watcher = Watcher(config, {}, writer, period_s=0.02)
        servicers = make_servicers(None, watcher.models, writer, watcher.draining)
        server = make_server(config, servicers)
        channel = grpc.aio.insecure_channel(config.address)
        opened.append((watcher, server, channel))
        watcher.start()
        await server.start()
        generation: Any = generation_grpc.GenerationServiceStub(channel)
        models: Any = model_grpc.ModelServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        return WatchingServer(directory, watcher, generation, models, health)

    yield start
    for watcher, server, channel in opened:
        await channel.close()
        await watcher.stop()
        watcher.close()
        await server.stop(None)
    left = [t.name for t in set(threading.enumerate()) - before if t.name.startswith("engine-")]
    assert not left


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    return raised.value.code().name, str(raised.value.details())


def tokens(events: list[pb.GenerateResponse]) -> list[int]:
    return [token for event in events for token in event.tokens.ids]


def names(events: list[pb.GenerateResponse]) -> list[str]:
    """Kinds of events, without repetition."""
    kinds = [str(event.WhichOneof("event")) for event in events]
    return [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]]


async def rest(call: Any) -> list[pb.GenerateResponse]:
    async with asyncio.timeout(LIMIT_S):
        return [event async for event in call]


def reserved(model: str) -> float:
    labels = {"model_name": model}
    return REGISTRY.get_sample_value("concertina_state_buffer_bytes", labels) or 0.0


async def test_a_server_may_start_with_nothing(
    start: Start, directory: Path, text_bundle: Path
) -> None:
    served = await start()
    status = await served.health.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
    assert status.status == health_pb2.HealthCheckResponse.SERVING
    assert await served.listed() == {}
    for model in ("", TEXT):
        assert (await refused(served.stream(model)))[0] == "NOT_FOUND"
    fingerprint = put(text_bundle, directory / "a")
    await served.serves(tiny_text=fingerprint)
    assert names(await served.generate("")) == ["accepted", "tokens", "finished"]


async def test_a_bundle_comes_while_a_stream_runs(
    start: Start, directory: Path, text_bundle: Path, image_bundle: Path
) -> None:
    text = put(text_bundle, directory / "a")
    served = await start()
    alone = await served.generate(TEXT)
    with Gate(served.engines[TEXT]) as gate:
        running = served.stream(TEXT)
        await gate.held("step")
        gate.let(5)
        image = put(image_bundle, directory / "b")
        await served.serves(tiny_text=text, tiny_image=image)
        assert names(await served.generate(IMAGE)) == ["accepted", "tokens", "finished"]
        gate.let(float("inf"))
        assert tokens(await rest(running)) == tokens(alone)


async def test_a_bundle_that_goes_ends_its_streams_well(
    start: Start, directory: Path, text_bundle: Path, image_bundle: Path
) -> None:
    put(text_bundle, directory / "a")
    image = put(image_bundle, directory / "b")
    served = await start()
    alone = await served.generate(TEXT)
    model = served.engines[TEXT]
    with Gate(model) as gate:
        running = served.stream(TEXT)
        await gate.held("step")
        shutil.rmtree(directory / "a")
        await served.serves(tiny_image=image)
        status, details = await refused(served.stream(TEXT))
        assert status == "NOT_FOUND" and IMAGE in details
        await asyncio.sleep(SCANS_S)
        assert model.alive and reserved(TEXT)
        gate.let(float("inf"))
        assert tokens(await rest(running)) == tokens(alone)
    await until(lambda: not served.watcher.draining)
    assert not model.alive and not reserved(TEXT)
    assert names(await served.generate(IMAGE)) == ["accepted", "tokens", "finished"]
    gone = weakref.ref(model.engine.runtime)
    del model, gate
    await until(lambda: (gc.collect(), gone() is None)[1])


async def test_streams_that_do_not_end_in_time_get_an_ending(
    start: Start, directory: Path, text_bundle: Path, writer: SnapshotWriter
) -> None:
    """A kept and stored stream continues on another server of the bundle; others end."""
    put(text_bundle, directory / "a")
    served = await start(drain_seconds=0)
    alone = tokens(await served.generate(TEXT))
    model = served.engines[TEXT]
    with Gate(model) as gate:
        plain, kept = served.stream(TEXT), served.stream(TEXT, keep={"seconds": 60})
        await gate.held("step")
        await until(lambda: len(model.table) == 2)
        gate.let(5)
        await gate.held("step")
        shutil.rmtree(directory / "a")
        await served.serves()
        await until(lambda: model.engine.num_actions)  # the request to hand over is in the inbox
        gate.let(2)  # it publishes at the end of a turn
        handed = await rest(kept)
        await until(lambda: model.engine.closing)
        gate.let(float("inf"))
        ended = await rest(plain)
    assert names(ended)[-1] == "error" and "taken down" in ended[-1].error.message
    assert names(handed)[-1] == "handed_over"
    await until(lambda: not served.watcher.draining)
    resume = pb.ResumeRequest(
        stream_id=handed[0].accepted.stream_id,
        after_sequence=handed[-1].sequence,
        cursors=[pb.ResumeCursor(tokens=len(tokens(handed)))],
    )
    status, _ = await refused(served.generation.Resume(resume, timeout=LIMIT_S))
    assert status == "NOT_FOUND"
    fingerprint = put(text_bundle, directory / "again")
    await served.serves(tiny_text=fingerprint)
    more = await rest(served.generation.Resume(resume, timeout=LIMIT_S))
    assert tokens(handed) + tokens(more) == alone
    assert names(more)[-1] == "finished"


async def test_after_an_upgrade_running_streams_end_on_the_old_bundle(
    start: Start, directory: Path, text_bundle: Path
) -> None:
    old = put(text_bundle, directory / "a")
    served = await start(drain_seconds=3)
    alone = tokens(await served.generate(TEXT))
    before = served.engines[TEXT]
    with Gate(before) as gate:
        running = served.stream(TEXT, keep={"seconds": 60})
        await gate.held("step")
        new = put(text_bundle, directory / "a", version="2")
        await served.serves(tiny_text=new)
        assert reserved(TEXT) == 2 * before.engine.runtime.nbytes
        assert (await served.generate(TEXT))[0].accepted.fingerprint == new
        accepted = await running.read()
        assert accepted.accepted.fingerprint == old
        running.cancel()
        stream_id = accepted.accepted.stream_id
        gate.let(float("inf"))
        resume = pb.ResumeRequest(stream_id=stream_id, after_sequence=1)
        back = await rest(served.generation.Resume(resume, timeout=LIMIT_S))
        assert tokens(back) == alone and names(back)[-1] == "finished"
    await until(lambda: not served.watcher.draining)
    assert not before.alive and served.engines[TEXT].alive
    assert reserved(TEXT) == served.engines[TEXT].engine.runtime.nbytes
    status, details = await refused(served.generation.Resume(resume, timeout=LIMIT_S))
    assert status == "DATA_LOSS" and "another bundle" in details


@pytest.mark.parametrize("version", ["", "2"])
async def test_a_bundle_that_cannot_be_used_takes_nothing_down(
    start: Start,
    directory: Path,
    text_bundle: Path,
    image_bundle: Path,
    version: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A damaged or missing graph, in a new bundle or in place of a served one."""
    text = put(text_bundle, directory / "a")
    served = await start()
    model = served.engines[TEXT]
    with caplog.at_level(logging.ERROR, logger="server"):
        put(text_bundle, directory / "a", version, graph=b"\n\x0bnot a graph")
        put(image_bundle, directory / "b", version)
        damage(directory / "b")
        await until(lambda: len(caplog.records) >= 2)
        await asyncio.sleep(SCANS_S)
    reasons = " ".join(record.getMessage() + (record.exc_text or "") for record in caplog.records)
    assert len(caplog.records) == 2
    assert "step.onnx has" in reasons and "step.onnx cannot be loaded" in reasons
    assert served.engines == {TEXT: model}
    assert names(await served.generate(TEXT)) == ["accepted", "tokens", "finished"]
    assert await served.listed() == {TEXT: text}
    text = put(text_bundle, directory / "a", version="3")
    image = put(image_bundle, directory / "b")
    await served.serves(tiny_text=text, tiny_image=image)


async def test_of_two_bundles_with_one_name_the_first_stays(
    start: Start, directory: Path, text_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = put(text_bundle, directory / "b")
    served = await start()
    with caplog.at_level(logging.ERROR, logger="server"):
        second = put(text_bundle, directory / "a", version="2")
        await until(lambda: caplog.records)
        await asyncio.sleep(SCANS_S)
    (record,) = caplog.records
    assert f"{directory / 'a'} has the name 'tiny-text' of" in record.getMessage()
    await served.serves(tiny_text=first)
    shutil.rmtree(directory / "b")
    await served.serves(tiny_text=second)


async def test_a_folder_may_get_another_name(
    start: Start, directory: Path, text_bundle: Path
) -> None:
    put(text_bundle, directory / "a")
    served = await start()
    model = served.engines[TEXT]
    (directory / "a").rename(directory / "b")
    await asyncio.sleep(SCANS_S)
    assert served.engines == {TEXT: model} and model.alive and not served.watcher.draining
    shutil.rmtree(directory / "b")
    await until(lambda: not served.engines)


async def test_a_directory_that_cannot_be_read_changes_nothing(
    start: Start, directory: Path, text_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = put(text_bundle, directory / "a")
    served = await start()
    with caplog.at_level(logging.ERROR, logger="server"):
        directory.rename(directory.with_name("away"))
        await until(lambda: caplog.records)
        await asyncio.sleep(SCANS_S)
    (record,) = caplog.records
    assert f"cannot read {directory}" in record.getMessage()
    await served.serves(tiny_text=text)
    directory.with_name("away").rename(directory)
    shutil.rmtree(directory / "a")
    await until(lambda: not served.engines)


async def test_loading_does_not_block_the_loop(
    start: Start, directory: Path, text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_s, gaps, last = 0.5, list[float](), time.monotonic()

    def slowly(folder: Path) -> Any:
        time.sleep(load_s)
        return load_bundle(folder)

    def open_slowly(*arguments: Any) -> ServedModel:
        time.sleep(load_s)
        return ServedModel(*arguments)

    served = await start()
    monkeypatch.setattr("server.bundles.scanner.load_bundle", slowly)
    monkeypatch.setattr("server.hosts.watcher.ServedModel", open_slowly)
    put(text_bundle, directory / "a")
    async with asyncio.timeout(LIMIT_S):
        while not served.engines:
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - last)
            last += gaps[-1]
    assert max(gaps[1:]) < load_s / 2


async def test_a_stop_during_loading_leaves_no_engine(
    start: Start, directory: Path, text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture checks that no thread is left."""
    opening = threading.Event()

    def open_slowly(*arguments: Any) -> ServedModel:
        opening.set()
        time.sleep(0.3)
        return ServedModel(*arguments)

    served = await start()
    monkeypatch.setattr("server.hosts.watcher.ServedModel", open_slowly)
    put(text_bundle, directory / "a")
    await until(opening.is_set)
    await served.watcher.stop()
    assert list(served.engines) == [TEXT]

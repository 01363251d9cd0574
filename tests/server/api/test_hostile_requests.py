"""Whatever is asked for: an answer or a refusal that helps, never a mistake of the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import strategies as st

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import session_service_pb2 as session_pb
from server.api.limits import require_within_limits
from server.api.servicers import make_servicers
from server.api.validate import generate_request, resume_request, score_request
from server.bundles.bundle import Bundle
from server.config import EngineConfig, ServeConfig
from server.errors import RequestError
from server.hosts.local import make_server
from server.ops.ports import free_ports
from server.sessions.registry import SessionRegistry
from server.sessions.served_model import ServedModel
from server.snapshots.sealer import Sealer
from server.snapshots.store import Store
from server.snapshots.writer import SnapshotWriter
from tests.server.engines import LIMIT_S, is_empty, until
from tests.server.hostile import CASES, FORMS, Caller, Tally, examples, harmless, messages, mutated

SOON_S = 60.0  # Fork makes up to 128 copies, and each is stored
CONFIG = EngineConfig(slots=4, threads=1, snapshot_interval=16)
ASKED = {
    "Generate": pb.GenerateRequest,
    "Resume": pb.ResumeRequest,
    "Score": pb.ScoreRequest,
    "Pause": session_pb.PauseRequest,
    "Continue": session_pb.ContinueRequest,
    "Fork": session_pb.ForkRequest,
    "Export": session_pb.ExportRequest,
    "Import": session_pb.ImportRequest,
    "Delete": session_pb.DeleteRequest,
    "ListSessions": session_pb.ListSessionsRequest,
}


@pytest.mark.parametrize("form", FORMS)
def test_requests_are_checked_or_refused(form: str, text: Bundle, image: Bundle) -> None:
    def check(request: Message, pixels: bool) -> None:
        bundle = image if pixels else text
        try:
            require_within_limits(request)
            match request:
                case pb.GenerateRequest():
                    outputs = generate_request(bundle, request, CONFIG)
                    assert all(len(o.prompt) + o.max_tokens <= bundle.context for o in outputs)
                case pb.ScoreRequest():
                    assert len(score_request(bundle, request).prompt) <= bundle.context
                case pb.ResumeRequest():
                    resume_request(request)
        except RequestError as error:
            assert error.status == "INVALID_ARGUMENT"
            assert harmless(error.message)

    kinds = messages(pb.GenerateRequest), messages(pb.ScoreRequest), messages(pb.ResumeRequest)
    examples(Tally("requests", form), [st.one_of(*kinds), st.booleans()], check)


@dataclass
class Api:
    """The servicers over real engines, on a loop of their own."""

    runner: asyncio.Runner
    registry: SessionRegistry
    stream_ids: list[str] = field(default_factory=list)

    def call(self, method: str, request: Any) -> None:
        """Runs one call to its end."""
        self.runner.run(asyncio.wait_for(self._call(method, request), SOON_S))

    async def _call(self, method: str, request: Any) -> None:
        servicers, caller = (
            make_servicers(None, self.registry.models, self.registry.snapshots),
            Caller(),
        )
        service: Any = servicers.generation
        if not hasattr(generation_grpc.GenerationServiceServicer, method):
            service = servicers.sessions
        if method == "Import":
            request = _once(request)
        answer = getattr(service, method)(request, caller)
        if hasattr(answer, "__aiter__"):
            async for event in answer:
                if isinstance(event, pb.GenerateResponse):
                    assert event.error.code != "INTERNAL", event.error.message
                    assert harmless(event.error.message)
                    if event.accepted.keep.ByteSize():
                        self.stream_ids.append(event.accepted.stream_id)
        else:
            await answer
        caller.check()

    async def clear(self) -> None:
        """Deletes all sessions, in the store, too. Checks that no engine holds anything."""
        for name in {*self.stream_ids, *await self.registry.stored("")}:
            await self.registry.delete(name, "")
        for model in self.registry.models.values():
            for session in model.sessions(""):
                await self.registry.delete(session.lease.stream_id, "")
            await until(partial(is_empty, model))
        self.stream_ids.clear()


async def _once(request: Message) -> AsyncIterator[Message]:
    yield request


@pytest.fixture
def api(text: Bundle, image: Bundle, tmp_path: Path) -> Iterator[Api]:
    """Models of two bundles that share a store."""
    with ExitStack() as opened:
        runner = opened.enter_context(asyncio.Runner())
        writer = SnapshotWriter(Store(f"file://{tmp_path}/store"), Sealer.for_this_process(), 60.0)
        opened.callback(writer.close, LIMIT_S)
        engines = {bundle.name: ServedModel(bundle, CONFIG, writer) for bundle in (text, image)}
        for model in engines.values():
            opened.callback(model.close)
        yield Api(runner, SessionRegistry(engines, writer))


def _kept(model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model, keep={"seconds": 60}, stopping={"max_tokens": 3, "ignore_eos": True}
    )


@pytest.mark.parametrize("form", FORMS)
def test_calls_are_answered_or_refused(form: str, api: Api) -> None:
    models = [*api.registry.models]
    rounds = 0

    def call(method: str, data: st.DataObject) -> None:
        nonlocal rounds
        request = data.draw(messages(ASKED[method]))
        if hasattr(request, "model"):
            request.model = data.draw(st.sampled_from(models))
        if hasattr(request, "stream_id") and data.draw(st.integers(0, 3)):
            api.call("Generate", _kept(data.draw(st.sampled_from(models))))
            request.stream_id = api.stream_ids[-1]
        api.call(method, request)
        rounds += 1
        if rounds % 50 == 0:
            api.runner.run(api.clear())

    examples(Tally("calls", form), [st.sampled_from([*ASKED]), st.data()], call)
    api.runner.run(api.clear())


@pytest.mark.parametrize("form", FORMS)
async def test_bytes_are_answered_or_refused(form: str, text: Bundle, tmp_path: Path) -> None:
    """gRPC refuses bytes that are not a message before our code runs."""
    (port,) = free_ports(1)
    engines = {text.name: ServedModel(text, CONFIG)}
    server = make_server(ServeConfig((text.folder,), port=port), make_servicers(None, engines))
    await server.start()
    tally, rng = Tally("bytes", form), random.Random(5)
    seeds = [
        _kept(text.name).SerializeToString(),
        pb.ResumeRequest(
            stream_id="a", cursors=[{"tokens": 3, "last_ids": [1, 2]}]
        ).SerializeToString(),
        pb.ScoreRequest(prompt={"text": "abc"}).SerializeToString(),
    ]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for _ in range(tally.promised):
                method = rng.choice(["Generate", "Resume", "Score"])
                call = channel.unary_stream(f"/concertina.v1.GenerationService/{method}")
                await _read(call(mutated(rng.choice(seeds), rng), timeout=LIMIT_S))
                tally.cases += 1
        for session in engines[text.name].sessions(""):
            await engines[text.name].forget(session)
        await until(lambda: is_empty(engines[text.name]))
    finally:
        await server.stop(None)
        engines[text.name].close()
    tally.close()


async def _read(call: grpc.aio.UnaryStreamCall[bytes, bytes]) -> None:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        if "Exception deserializing request" not in (error.details() or ""):
            assert error.code() is not grpc.StatusCode.INTERNAL
            assert harmless(error.details() or "")


def test_the_promised_number_of_cases_runs() -> None:
    assert sum(slow for _, slow in CASES.values()) >= 50_000

"""The generation API over a real gRPC channel."""

from __future__ import annotations

import asyncio
import io
import statistics
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from PIL import Image

from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import generation_service_pb2_grpc as generation_grpc
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import model_service_pb2_grpc as model_grpc
from server.api import generation
from server.api.servicers import make_servicers
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.stream import Stream
from server.errors import BundleError
from server.sessions import served_model
from server.sessions.served_model import ServedModel, serve_bundles
from server.sessions.subscriber import Delta, Event, Subscriber
from server.sessions.table import Session
from tests.server.engines import LIMIT_S, Gate, change_logits, is_empty, script, until

TEXT, IMAGE = "tiny-text", "tiny-image"
SECRET = "a secret of /the/server"


@dataclass(frozen=True)
class Served:
    """A server and its clients."""

    served: dict[str, ServedModel]
    channel: grpc.aio.Channel

    @property
    def generation(self) -> generation_grpc.GenerationServiceStub:
        return generation_grpc.GenerationServiceStub(self.channel)

    @property
    def models(self) -> model_grpc.ModelServiceStub:
        return model_grpc.ModelServiceStub(self.channel)

    async def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        """All events of a stream. Checks their form and order."""
        events = [event async for event in self.generation.Generate(request, timeout=LIMIT_S)]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[0].HasField("accepted")
        for output in range(events[0].accepted.output.n):
            own = [event for event in events[1:] if event.output == output]
            kinds = [event.WhichOneof("event") for event in own]
            assert kinds[-1] in ("finished", "error")
            count = kinds.count("prompt_logprobs")
            assert kinds[:-1] == ["prompt_logprobs"] * count + ["tokens"] * (len(own) - 1 - count)
            position = events[0].accepted.prompt_tokens
            for event in own[count:-1]:
                assert event.tokens.first_position == position
                position += len(event.tokens.ids)
        return events


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(text_bundle: Path, image_bundle: Path) -> AsyncIterator[Serve]:
    """Serves bundles, by default both. At the end, checks that no engine holds anything."""
    servers, served = list[grpc.aio.Server](), list[Served]()

    async def serve(*names: str, **settings: float) -> Served:
        folders = {TEXT: text_bundle, IMAGE: image_bundle}
        chosen = [folders[name] for name in names or (TEXT, IMAGE)]
        models = serve_bundles(chosen, EngineConfig(threads=1, **settings))  # type: ignore[arg-type]
        server, servicers = grpc.aio.server(), make_servicers(None, models)
        generation_grpc.add_GenerationServiceServicer_to_server(servicers.generation, server)
        model_grpc.add_ModelServiceServicer_to_server(servicers.models, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        served.append(Served(models, grpc.aio.insecure_channel(f"127.0.0.1:{port}")))
        return served[-1]

    yield serve
    models = [model for one in served for model in one.served.values()]
    try:
        for one in served:
            await one.channel.close()
        await until(lambda: all(is_empty(model) for model in models if model.alive), limit_s=10)
    finally:
        for server in servers:
            await server.stop(None)
        for model in models:
            model.close()


def _ids(events: list[pb.GenerateResponse]) -> list[int]:
    return [token for event in events for token in event.tokens.ids]


def _text(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.tokens.text for event in events)


# ---- streams that go well


async def test_an_empty_request_gets_all_defaults(serve: Serve, text: Bundle) -> None:
    served = await serve(TEXT)
    events = await served.generate(pb.GenerateRequest())
    accepted, finished = events[0].accepted, events[-1].finished
    assert (accepted.model, accepted.prompt_tokens) == (TEXT, 0)
    assert accepted.fingerprint == text.manifest.fingerprint
    assert len(accepted.stream_id) >= 20
    sampling = pb.SamplingParameters(
        temperature=1,
        top_k=0,
        top_p=1,
        min_p=0,
        seed=accepted.sampling.seed,
        typical_p=1,
        repetition_penalty=1,
        presence_penalty=0,
        frequency_penalty=0,
    )
    assert accepted.sampling == sampling
    assert accepted.stopping == pb.StoppingCriteria(
        max_tokens=96, ignore_eos=False, min_tokens=0, include_stop=False
    )
    assert accepted.output == pb.OutputOptions(n=1, stream_interval=1)
    assert finished.reason in (pb.FINISH_REASON_MAX_TOKENS, pb.FINISH_REASON_END)
    assert finished.usage.prompt_tokens == 0
    assert finished.usage.state_bytes > 0


async def test_the_request_is_echoed(serve: Serve) -> None:
    served = await serve(TEXT)
    sampling = pb.SamplingParameters(
        temperature=0.5,
        top_k=7,
        top_p=0.75,
        min_p=0.125,
        seed=(1 << 64) - 1,
        typical_p=0.875,
        repetition_penalty=1.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5, 250: -2},
        allowed_token_ids=[3, 4, 250],
        bad_words=["é", "no"],
    )
    stopping = pb.StoppingCriteria(
        max_tokens=5,
        min_tokens=2,
        include_stop=True,
        stop=["never", "\n\n"],
        stop_token_ids=[3, 9],
        ignore_eos=True,
        time_limit=Duration(seconds=8, nanos=290_000_000),  # not a float
    )
    request = pb.GenerateRequest(
        model=TEXT, prompt=pb.Prompt(text="é!"), sampling=sampling, stopping=stopping
    )
    request.output.CopyFrom(pb.OutputOptions(n=2, logprobs=0, prompt_logprobs=3, stream_interval=4))
    accepted = (await served.generate(request))[0].accepted
    assert (accepted.sampling, accepted.stopping) == (sampling, stopping)
    assert accepted.output == request.output
    assert accepted.prompt_tokens == 3


@pytest.mark.parametrize("model", [TEXT, IMAGE])
async def test_the_echo_asks_for_the_same_stream_again(serve: Serve, model: str) -> None:
    served = await serve()
    first = await served.generate(pb.GenerateRequest(model=model))
    accepted = first[0].accepted
    again = await served.generate(
        pb.GenerateRequest(model=model, sampling=accepted.sampling, stopping=accepted.stopping)
    )
    other = await served.generate(pb.GenerateRequest(model=model))
    assert _ids(again) == _ids(first)
    assert _ids(other) != _ids(first)
    assert len({events[0].accepted.stream_id for events in (first, again, other)}) == 3


async def test_the_end_of_a_text(serve: Serve) -> None:
    served = await serve(TEXT)
    script(served.served[TEXT], b"one two\0".ljust(96))
    end = await served.generate(pb.GenerateRequest())
    assert (_text(end), bytes(_ids(end))) == ("one two", b"one two")
    assert end[-1].finished.reason == pb.FINISH_REASON_END
    assert not end[-1].finished.HasField("stop")
    assert end[-1].finished.usage.generated_tokens == 8
    stopping = pb.StoppingCriteria(stop=["tw"])
    stop = await served.generate(pb.GenerateRequest(stopping=stopping))
    assert (_text(stop), stop[-1].finished.stop) == ("one ", "tw")
    assert stop[-1].finished.reason == pb.FINISH_REASON_STOP
    stopping = pb.StoppingCriteria(ignore_eos=True, max_tokens=10)
    on = await served.generate(pb.GenerateRequest(stopping=stopping))
    assert (_text(on), on[-1].finished.reason) == ("one two\0  ", pb.FINISH_REASON_MAX_TOKENS)


async def test_an_image_is_completed_in_its_colours(serve: Serve, image: Bundle) -> None:
    served = await serve()
    palette = np.frombuffer(image.manifest.image.palette, np.uint8).reshape(-1, 3)
    pixels = palette[np.arange(24) % 16].reshape(3, 8, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    prompt = pb.Prompt(image=pb.ImageRows(png=file.getvalue()), label="square")
    events = await served.generate(pb.GenerateRequest(model=IMAGE, prompt=prompt))
    assert events[0].accepted.prompt_tokens == 24
    assert len(_ids(events)) == 40
    rgb = b"".join(event.tokens.rgb for event in events)
    assert rgb == palette[_ids(events)].tobytes()
    assert not _text(events)
    assert events[-1].finished.reason == pb.FINISH_REASON_END


async def test_usage_adds_up(serve: Serve) -> None:
    served = await serve(TEXT)
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="0123456789"),
        stopping=pb.StoppingCriteria(max_tokens=30, ignore_eos=True),
    )
    usage = (await served.generate(request))[-1].finished.usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (10, 30)
    times = (usage.queue_time, usage.time_to_first_token, usage.total_time)
    nanoseconds = [time.ToNanoseconds() for time in times]
    assert 0 < nanoseconds[0] < nanoseconds[1] < nanoseconds[2] < LIMIT_S * 1e9


async def test_sixteen_streams_at_once(serve: Serve) -> None:
    served = await serve(slots=4)

    def request(number: int) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            model=(TEXT, IMAGE)[number % 2],
            prompt=pb.Prompt(tokens=pb.TokenIds(ids=range(1, 2 + number % 9))),
            sampling=pb.SamplingParameters(seed=number),
            stopping=pb.StoppingCriteria(max_tokens=20),
        )

    alone = [_ids(await served.generate(request(number))) for number in range(16)]
    crowd = await asyncio.gather(*[served.generate(request(number)) for number in range(16)])
    assert [_ids(events) for events in crowd] == alone


async def test_outputs_of_one_request_are_those_of_one_stream(serve: Serve) -> None:
    """Sequence numbers count over all outputs; each output has its own positions and ending."""
    served = await serve(TEXT, slots=2)
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="ab"),
        sampling=pb.SamplingParameters(seed=5),
        stopping=pb.StoppingCriteria(max_tokens=12, ignore_eos=True),
        output=pb.OutputOptions(n=3, logprobs=1, prompt_logprobs=2),
    )
    events = await served.generate(request)
    reports = [event for event in events if event.HasField("prompt_logprobs")]
    assert [event.output for event in reports] == [0] * len(reports)
    assert sum(len(event.prompt_logprobs.logprobs) for event in reports) == 2
    for output in range(3):
        own = [event for event in events[1:] if event.output == output and event not in reports]
        for event in own[:-1]:
            assert len(event.tokens.logprobs) == len(event.tokens.ids)
            assert all(len(one.top_ids) == 1 for one in event.tokens.logprobs)
        assert len(_ids(own)) == own[-1].finished.usage.generated_tokens == 12
    request.output.CopyFrom(pb.OutputOptions(n=1))
    first = [_ids([event]) for event in events if event.output == 0]
    assert _ids(await served.generate(request)) == [token for ids in first for token in ids]


async def test_every_output_ends_when_the_servicer_fails(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(TEXT)
    respond = generation.response_message

    def fail(*arguments: Any) -> pb.GenerateResponse:
        response = respond(*arguments)
        if response.output == 1 and response.HasField("tokens"):
            raise RuntimeError("secret")
        return response

    monkeypatch.setattr(generation, "response_message", fail)
    request = pb.GenerateRequest(
        stopping=pb.StoppingCriteria(max_tokens=96, ignore_eos=True), output=pb.OutputOptions(n=3)
    )
    events = await served.generate(request)
    assert [(e.output, e.error.code) for e in events[-3:]] == [(n, "INTERNAL") for n in range(3)]
    assert "secret" not in str(events)


# ---- streams that are dropped


def _long(max_tokens: int = 96) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=TEXT, stopping=pb.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True)
    )


async def test_a_cancelled_call_frees_its_slot_before_the_next_step(serve: Serve) -> None:
    served = await serve(TEXT, slots=1)
    model = served.served[TEXT]
    with Gate(model) as gate:
        call = served.generation.Generate(_long())
        await call.read()
        await gate.held("step")
        await gate.let_one("step")
        assert len(model.engine.placement.running) == 1
        call.cancel()
        await until(lambda: model.engine.num_actions)  # the server has heard of it
        gate.let(1)
        await until(lambda: is_empty(model))
        assert gate.passes == 2


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_client_that_goes_away_leaves_nothing(serve: Serve, after: int) -> None:
    served = await serve(TEXT, slots=4)
    model = served.served[TEXT]
    with Gate(model) as gate:
        calls = [served.generation.Generate(_long()) for _ in range(4)]
        await until(lambda: model.engine.ledger.held.streams == 4)
        for call in calls[:2]:
            for _ in range(after):
                gate.let(1)
                await asyncio.wait_for(call.read(), LIMIT_S)
        await served.channel.close()
        async with asyncio.timeout(LIMIT_S):
            while model.engine.ledger.held.streams:
                gate.let(1)
                await asyncio.sleep(0.05)
        assert gate.passes < 80, "the streams were cancelled, not finished"


async def test_a_generator_that_is_dropped_in_the_middle_cancels(serve: Serve) -> None:
    """Some hosts do not cancel the handler: they only stop reading."""
    served = await serve(TEXT, slots=1, stream_buffer=4)
    model = served.served[TEXT]
    events = make_servicers(None, served.served).generation.Generate(_long(), _Context())
    kinds = [(await anext(events)).WhichOneof("event") for _ in range(2)]
    assert kinds == ["accepted", "tokens"]
    await until(lambda: model.engine.placement.paused)
    await events.aclose()  # type: ignore[attr-defined]
    await until(lambda: is_empty(model))


async def test_a_cancelled_score_leaves_nothing(serve: Serve) -> None:
    served = await serve(TEXT)
    model = served.served[TEXT]
    with Gate(model) as gate:
        call = served.generation.Score(pb.ScoreRequest(prompt=pb.Prompt(text="x" * 90)))
        await gate.held("prefill")
        call.cancel()
        await until(lambda: model.engine.num_actions)
        gate.let(1)
        await until(lambda: is_empty(model))


class _Context:
    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return ()

    def set_code(self, code: grpc.StatusCode) -> None:
        raise AssertionError(code)

    def set_trailing_metadata(self, trailing_metadata: object) -> None:
        pass

    def set_details(self, details: str) -> None:
        raise AssertionError(details)


# ---- requests that are refused, and streams that fail


async def _refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, LIMIT_S)
    assert SECRET not in str(caught.value)
    assert SECRET not in str(caught.value.trailing_metadata())
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize(
    ("request_", "code", "named"),
    [
        (pb.GenerateRequest(model="gpt"), "NOT_FOUND", "'gpt' is not served here; these are: tiny"),
        (pb.GenerateRequest(), "NOT_FOUND", "model is empty, and several are served"),
        (
            pb.GenerateRequest(model=TEXT, prompt=pb.Prompt()),
            "INVALID_ARGUMENT",
            "prompt is empty",
        ),
        (
            pb.GenerateRequest(model=TEXT, sampling=pb.SamplingParameters(top_p=0)),
            "INVALID_ARGUMENT",
            "sampling.top_p is 0.0",
        ),
        (
            pb.GenerateRequest(
                model=IMAGE, prompt=pb.Prompt(image=pb.ImageRows(png=b"\0" * 2_000_000))
            ),
            "INVALID_ARGUMENT",
            "prompt.image.png has 2000000 bytes",
        ),
        (
            pb.GenerateRequest(
                model=TEXT,
                stopping=pb.StoppingCriteria(time_limit=Duration(seconds=(1 << 63) - 1)),
            ),
            "INVALID_ARGUMENT",
            "stopping.time_limit",
        ),
    ],
)
async def test_a_bad_request_is_refused_by_status_and_takes_no_slot(
    serve: Serve, request_: pb.GenerateRequest, code: str, named: str
) -> None:
    served = await serve()
    status, details = await _refusal(served.generation.Generate(request_).read())
    assert (status.name, named in details) == (code, True), details
    assert all(model.engine.ledger.held.streams == 0 for model in served.served.values())
    assert await served.generate(_long(3))


async def test_scoring_refuses_alike(serve: Serve) -> None:
    served = await serve()
    score = served.generation.Score
    status, details = await _refusal(score(pb.ScoreRequest(model=TEXT)))
    assert (status.name, "prompt is empty" in details) == ("INVALID_ARGUMENT", True)
    status, details = await _refusal(score(pb.ScoreRequest(model="x" * 256)))
    assert (status.name, len(details) < 300) == ("NOT_FOUND", True)


async def test_a_full_queue_refuses_at_once(serve: Serve) -> None:
    """An event has the time to retry after, since a status has only text."""
    served = await serve(TEXT, slots=1, queue_limit=0)
    model = served.served[TEXT]
    with Gate(model) as gate:
        running = asyncio.create_task(served.generate(_long()))
        await gate.held("step")
        refused = served.generation.Generate(_long())
        event = await refused.read()
        assert (event.sequence, event.error.code) == (1, "RESOURCE_EXHAUSTED")
        assert event.error.retryable
        assert event.error.retry_after == Duration(seconds=1)
        status, details = await _refusal(refused.read())
        assert (status.name, details) == ("RESOURCE_EXHAUSTED", event.error.message)
        assert "at most 1 streams" in details
        scored = served.generation.Score(pb.ScoreRequest(prompt=pb.Prompt(text="x")))
        assert (await _refusal(scored))[0].name == "RESOURCE_EXHAUSTED"
        # Without room, the request is refused before it is read for its model, but what no model
        # takes is told at once.
        nonsense = pb.GenerateRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[999])))
        event = await served.generation.Generate(nonsense).read()
        assert event.error.code == "RESOURCE_EXHAUSTED"
        nonsense = pb.GenerateRequest(sampling=pb.SamplingParameters(temperature=-1))
        status, details = await _refusal(served.generation.Generate(nonsense).read())
        assert (status.name, "temperature is -1" in details) == ("INVALID_ARGUMENT", True)
    assert len(_ids(await running)) == 96


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"slots": 1, "queue_limit": 1}, "streams"),
        ({"queue_tokens": 100}, "prompt tokens"),
        ({"state_limit_bytes": 10_000}, "bytes of state"),
    ],
)
async def test_refusals_take_at_most_50_ms_while_the_engine_is_busy(
    serve: Serve, settings: dict[str, float], reason: str
) -> None:
    """The engine is full and stands still in a pass of the model."""
    served = await serve(TEXT, **settings)
    model = served.served[TEXT]
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="x" * 60), stopping=pb.StoppingCriteria(max_tokens=20)
    )
    with Gate(model) as gate:
        taken, seconds = [], []
        while len(seconds) < 30:
            began = time.perf_counter()
            call = served.generation.Generate(request)
            event = await asyncio.wait_for(call.read(), LIMIT_S)
            if event.HasField("accepted"):
                taken.append(call)
                await gate.held("prefill")
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            seconds.append(time.perf_counter() - began)
            assert (event.error.code, event.error.retryable) == ("RESOURCE_EXHAUSTED", True)
            assert reason in event.error.message and "try again later" in event.error.message
            assert 0.1e9 <= event.error.retry_after.ToNanoseconds() <= 30e9
            assert caught.value.code().name == "RESOURCE_EXHAUSTED"
        assert 1 <= len(taken) <= 2
        # The median, since other processes on this machine take time, too.
        assert statistics.median(seconds) < 0.05
        for call in taken:
            call.cancel()


async def test_a_request_that_never_fits_is_not_retryable(serve: Serve) -> None:
    served = await serve(TEXT, state_limit_bytes=100)
    status, details = await _refusal(served.generation.Generate(_long()).read())
    assert status.name == "INVALID_ARGUMENT"
    assert "lower max_tokens" in details


async def test_a_call_whose_deadline_passes_frees_its_slot_at_once(serve: Serve) -> None:
    """Running or waiting: the call ends with a status, and the engine continues."""
    served = await serve(TEXT, slots=1)
    model = served.served[TEXT]
    prompted = pb.GenerateRequest(
        prompt=pb.Prompt(text="x" * 60), stopping=pb.StoppingCriteria(max_tokens=20)
    )
    with Gate(model) as gate:
        calls = [served.generation.Generate(_long(), timeout=0.5)]
        await asyncio.wait_for(calls[0].read(), LIMIT_S)
        await gate.held("step")
        calls += [served.generation.Generate(prompted, timeout=0.4) for _ in range(2)]
        await until(lambda: model.engine.ledger.held.streams == 3)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while True:
                    await asyncio.wait_for(call.read(), LIMIT_S)
            assert caught.value.code().name == "DEADLINE_EXCEEDED"
        await until(lambda: model.engine.num_actions == 2 + 3)  # two came, all three are gone
        gate.let(1)
        await until(lambda: is_empty(model))
        assert gate.passes == 1
    assert len(_ids(await served.generate(_long()))) == 96


async def test_the_priority_in_force_is_echoed(serve: Serve) -> None:
    served = await serve(TEXT)
    for priority in (-100, 0, 7):
        request = pb.GenerateRequest(stopping=pb.StoppingCriteria(max_tokens=1), priority=priority)
        assert (await served.generate(request))[0].accepted.priority == priority


async def test_running_and_new_streams_end_when_the_engine_stops(serve: Serve) -> None:
    served = await serve(TEXT)
    model = served.served[TEXT]
    with Gate(model) as gate:
        running = asyncio.create_task(served.generate(_long()))
        score = pb.ScoreRequest(prompt=pb.Prompt(text="x" * 60))
        scored = asyncio.ensure_future(served.generation.Score(score))
        await until(lambda: model.engine.ledger.held.streams == 2)
        closing = asyncio.create_task(asyncio.to_thread(model.close))
        await until(lambda: model.engine.closing)
        gate.let(1)
    await closing
    error = (await running)[-1].error
    assert (error.code, error.retryable) == ("UNAVAILABLE", True)
    assert (await _refusal(scored))[0].name == "UNAVAILABLE"
    refused = served.generation.Generate(_long())
    assert (await refused.read()).error.code == "UNAVAILABLE"
    assert (await _refusal(refused.read()))[0].name == "UNAVAILABLE"


@pytest.mark.parametrize("what", ["generate_request", "score_request", "find"])
async def test_an_internal_error_before_the_stream_leaks_nothing(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    served = await serve(TEXT)
    monkeypatch.setattr(generation, what, _raise)
    if what != "score_request":
        status, details = await _refusal(served.generation.Generate(_long()).read())
        assert (status.name, details) == ("INTERNAL", "internal error; see the server's log")
    if what != "generate_request":
        score = pb.ScoreRequest(prompt=pb.Prompt(text="x"))
        status, details = await _refusal(served.generation.Score(score))
        assert (status.name, details) == ("INTERNAL", "internal error; see the server's log")
    assert SECRET in caplog.text


def _raise(*args: object) -> None:
    raise RuntimeError(SECRET)


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_an_internal_error_in_a_stream_is_its_last_event_and_leaks_nothing(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    after: int,
) -> None:
    """The engine's events fail, or their conversion to messages."""
    served = await serve(TEXT, stream_buffer=2)
    model, events = served.served[TEXT], ServedModel.events
    response = generation.response_message
    sent = 0

    async def break_off(
        self: ServedModel, session: Session, subscribers: Sequence[Subscriber]
    ) -> AsyncIterator[tuple[Stream, Event]]:
        seen = 0
        async for event in events(self, session, subscribers):
            if seen == after:
                raise RuntimeError(SECRET)
            yield event
            seen += 1

    def answer(*args: object) -> pb.GenerateResponse:
        nonlocal sent
        sent += 1
        if sent == after + 1 and isinstance(args[2], Delta):
            raise RuntimeError(SECRET)
        return response(*args)  # type: ignore[arg-type]

    for patch in ((ServedModel, "events", break_off), (generation, "response_message", answer)):
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            all_events = await served.generate(_long())
        assert len(all_events) == 2 + after
        error = all_events[-1].error
        assert (error.code, error.message) == ("INTERNAL", "internal error; see the server's log")
        assert SECRET in caplog.text
        caplog.clear()
        await until(lambda: is_empty(model))
    assert len(_ids(await served.generate(_long(9)))) == 9


async def test_a_failed_step_is_an_event_of_the_stream(serve: Serve) -> None:
    served = await serve(TEXT)

    def spoil(logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.where(positions[:, None] == 5, np.nan, logits)

    change_logits(served.served[TEXT], spoil)
    events = await served.generate(_long())
    error = events[-1].error
    assert (error.code, error.retryable, len(_ids(events))) == ("INTERNAL", True, 5)
    assert "position 5" in error.message
    assert not error.HasField("retry_after")


# ---- scores and models


async def test_score(serve: Serve, text: Bundle) -> None:
    served = await serve()
    request = pb.ScoreRequest(model=TEXT, prompt=pb.Prompt(text="some words"))
    response = await served.generation.Score(request, timeout=LIMIT_S)
    assert len(response.bits) == 10
    assert all(bits > 0 for bits in response.bits)
    assert response.bits_per_token == pytest.approx(np.mean(response.bits))
    assert (response.model, response.fingerprint) == (TEXT, text.manifest.fingerprint)


async def test_models(serve: Serve, text: Bundle, image: Bundle) -> None:
    served = await serve(TEXT, IMAGE, slots=3, queue_limit=7)
    listed = await served.models.ListModels(model_pb.ListModelsRequest(), timeout=LIMIT_S)
    assert [model.manifest for model in listed.models] == [image.manifest, text.manifest]
    for model, bundle in zip(listed.models, (image, text), strict=True):
        assert (model.slots, model.queue_limit) == (3, 7)
        assert model.max_state_bytes == bundle.max_state_bytes
        request = model_pb.GetModelRequest(model=bundle.name)
        found = await served.models.GetModel(request, timeout=LIMIT_S)
        assert found.model == model
    for name in ("", "gpt"):
        call = served.models.GetModel(model_pb.GetModelRequest(model=name))
        status, details = await _refusal(call)
        assert (status.name, "tiny-image, tiny-text" in details) == ("NOT_FOUND", True)


async def test_the_only_model_needs_no_name(serve: Serve) -> None:
    served = await serve(IMAGE)
    found = await served.models.GetModel(model_pb.GetModelRequest(), timeout=LIMIT_S)
    assert found.model.manifest.name == IMAGE
    assert (await served.generate(pb.GenerateRequest()))[0].accepted.model == IMAGE


# ---- opening


def _alive() -> int:
    return sum(thread.name.startswith("engine-") for thread in threading.enumerate())


def test_two_bundles_of_one_name_are_refused(text_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"another bundle is named 'tiny-text'"):
        serve_bundles([text_bundle, text_bundle], EngineConfig())
    assert _alive() == 0


def test_a_bundle_that_cannot_be_opened_leaves_no_engine_running(
    text_bundle: Path, image_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle"):
        serve_bundles([text_bundle, tmp_path], EngineConfig())
    assert _alive() == 0

    def only_one(bundle: Bundle, config: EngineConfig, snapshots: None) -> ServedModel:
        if not bundle.codec.writes_text:
            raise BundleError("broken")
        return ServedModel(bundle, config)

    monkeypatch.setattr(served_model, "ServedModel", only_one)
    with pytest.raises(BundleError, match="broken"):
        serve_bundles([text_bundle, image_bundle], EngineConfig(threads=1))
    assert _alive() == 0

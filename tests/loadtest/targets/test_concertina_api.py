"""Every way in which a server can break a stream must show in the record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest

from concertina.client import ServerUnavailable
from concertina.client.channel import Access
from concertina.v1 import generation_service_pb2 as pb
from loadtest.record import CANCELLED, Record
from loadtest.target import Tally
from loadtest.targets.concertina_api import concertina_target
from loadtest.workload import Request
from tests.loadtest import scripted
from tests.loadtest.scripted import Context, Events, Serve, Stream, keep_contract

REQUEST = Request(prompt=(5, 6, 7), output_tokens=7, seed=9)


async def observe(address: str, request: Request = REQUEST, timeout_s: float = 20) -> Record:
    async with concertina_target(
        address, "m", Access(), channels=1, timeout_s=timeout_s, keep_s=0
    ) as target:
        return await target.senders[0](request, time.perf_counter_ns(), Tally())


async def observe_script(serve: Serve, change: Callable[[Events], Events]) -> Record:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in change(keep_contract(request)):
            yield event

    return await observe(await serve(script))


async def test_a_whole_stream_is_timed_event_by_event(serve: Serve) -> None:
    requests: list[pb.GenerateRequest] = []

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        requests.append(request)
        for event in keep_contract(request):
            await asyncio.sleep(0.05)
            yield event

    before_ns = time.perf_counter_ns()
    record = await observe(await serve(script))
    assert record.whole and record.stream_id == "s" and record.prompt_tokens == 3
    assert record.counts == (2, 2, 2, 1)
    assert record.accepted_ns is not None
    stamps = [
        before_ns,
        record.due_ns,
        record.started_ns,
        record.accepted_ns,
        *record.tokens_ns,
        record.ended_ns,
    ]
    assert stamps == sorted(stamps)
    # Time to first token begins before the call: it holds the waits for two events.
    assert record.tokens_ns[0] - record.started_ns >= 0.1e9
    assert record.ended_ns - record.tokens_ns[-1] >= 0.03e9

    (request,) = requests
    assert request.model == "m"
    assert list(request.prompt.tokens.ids) == [5, 6, 7]
    assert request.sampling.seed == 9
    assert request.stopping.max_tokens == 7 and request.stopping.ignore_eos


def moved(events: Events, position: int) -> Events:
    events[3].tokens.first_position = position
    return events


def without_last_tokens(events: Events) -> Events:
    del events[-2]
    events[-1].sequence -= 1
    return events


def with_more_tokens(events: Events) -> Events:
    events[-2].tokens.ids.extend([1, 1])
    return events


def finished_twice(events: Events) -> Events:
    last = pb.GenerateResponse(sequence=events[-1].sequence + 1, finished=pb.Finished())
    return [*events, last]


def other_prompt(events: Events) -> Events:
    events[0].accepted.prompt_tokens -= 1
    for event in events[1:-1]:
        event.tokens.first_position -= 1
    return events


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda e: e[:2] + e[3:], "event 4 follows event 2", id="gap"),
        pytest.param(lambda e: [*e[:3], e[2], *e[3:]], "event 3 follows event 3", id="repeated"),
        pytest.param(lambda e: moved(e, 5), "position 5", id="duplicate position"),
        pytest.param(lambda e: moved(e, 8), "position 8", id="skipped position"),
        pytest.param(lambda e: e[:-1], "without a terminal event", id="no terminal event"),
        pytest.param(lambda e: [], "without a terminal event", id="no event"),
        pytest.param(finished_twice, "follows the terminal event", id="two terminal events"),
        pytest.param(without_last_tokens, "6 tokens arrived, 7 were", id="short"),
        pytest.param(with_more_tokens, "9 tokens arrived, 7 were", id="long"),
        pytest.param(other_prompt, "2 prompt tokens, 3 were sent", id="prompt cut"),
        pytest.param(lambda e: e[1:], "event 2 follows event 0", id="not accepted"),
    ],
)
async def test_a_broken_stream_is_a_violation(
    serve: Serve, change: Callable[[Events], Events], says: str
) -> None:
    record = await observe_script(serve, change)
    assert says in record.violation
    assert not record.failure and not record.whole


async def test_a_first_token_that_others_follow_from_is_not_counted(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in other_prompt(keep_contract(request)):
            yield event

    address = await serve(script)
    assert (await observe(address, replace(REQUEST, first_counts=False))).whole
    assert "2 prompt tokens, 3 were" in (await observe(address)).violation


async def test_an_error_event_is_a_failure(serve: Serve) -> None:
    def fail(events: Events) -> Events:
        error = pb.Error(code="INTERNAL", message="the step failed")
        return [*events[:3], pb.GenerateResponse(sequence=4, error=error)]

    record = await observe_script(serve, fail)
    assert record.failure == "GenerationFailed INTERNAL"
    assert not record.violation and not record.whole
    assert record.counts == (2, 2)


async def test_a_refusal_is_a_failure_that_says_how_long_to_wait(serve: Serve) -> None:
    def refuse(_: Events) -> Events:
        error = pb.Error(code="RESOURCE_EXHAUSTED", message="full", retryable=True)
        error.retry_after.FromMilliseconds(1500)
        return [pb.GenerateResponse(sequence=1, error=error)]

    record = await observe_script(serve, refuse)
    assert record.failure == "Overloaded RESOURCE_EXHAUSTED"
    assert record.retry_after_s == 1.5
    assert record.stream_id == "" and record.accepted_ns is None


async def test_a_status_before_acceptance_is_a_failure(serve: Serve) -> None:
    async def script(_: pb.GenerateRequest, context: Context) -> Stream:
        context.set_code(grpc.StatusCode.INVALID_ARGUMENT)
        context.set_details("no")
        return
        yield

    assert (await observe(await serve(script))).failure == "InvalidRequest INVALID_ARGUMENT"


async def test_a_status_in_the_middle_is_a_violation(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, context: Context) -> Stream:
        for event in keep_contract(request)[:2]:
            yield event
        context.set_code(grpc.StatusCode.UNAVAILABLE)

    assert "UNAVAILABLE" in (await observe(await serve(script))).violation


async def test_a_server_that_stalls_meets_the_timeout(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        yield keep_contract(request)[0]
        await asyncio.sleep(60)

    record = await observe(await serve(script), timeout_s=0.5)
    assert record.failure == "DeadlineExceeded DEADLINE_EXCEEDED"


async def test_cancelling_the_task_ends_the_stream_and_keeps_the_record(serve: Serve) -> None:
    gone = asyncio.Event()

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        try:
            for event in keep_contract(request)[:2]:
                yield event
            await asyncio.sleep(60)
        finally:
            gone.set()

    address = await serve(script)
    tally = Tally()
    opened = concertina_target(address, "", Access(), channels=1, timeout_s=20, keep_s=0)
    async with opened as target:
        task = asyncio.ensure_future(target.senders[0](REQUEST, time.perf_counter_ns(), tally))
        async with asyncio.timeout(20):
            while not tally.tokens:
                await asyncio.sleep(0.01)
            assert (tally.running, tally.ended) == (1, 0)
            task.cancel()
            record = await task
            await gone.wait()
    assert record.failure == CANCELLED
    assert record.counts == (2,)
    assert (tally.running, tally.ended, tally.tokens) == (0, 1, 2)


async def test_a_server_that_goes_away_is_a_failure(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in keep_contract(request):
            yield event

    server, address = await scripted.serve(script)
    opened = concertina_target(address, "", Access(), channels=1, timeout_s=20, keep_s=0)
    async with opened as target:
        await server.stop(None)
        record = await target.senders[0](REQUEST, time.perf_counter_ns(), Tally())
    assert record.failure == "ServerUnavailable UNAVAILABLE"


async def test_nobody_at_the_address_is_an_error() -> None:
    with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
        await observe("127.0.0.1:1")


async def test_the_server_tells_how_long_it_queued_and_what_it_held(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        events = keep_contract(request)
        events[-1].finished.usage.queue_time.FromMilliseconds(250)
        events[-1].finished.usage.state_bytes = 4096
        for event in events:
            yield event

    record = await observe(await serve(script))
    assert (record.queue_s, record.state_bytes) == (0.25, 4096)

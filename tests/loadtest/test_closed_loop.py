from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise, repeat

import pytest

from concertina.client import InvalidRequest
from concertina.client.channel import Access
from concertina.v1 import generation_service_pb2 as pb
from loadtest.closed_loop import drive
from loadtest.measure import Plan, measure
from loadtest.record import CANCELLED, UNFINISHED
from loadtest.run import Run, Window
from loadtest.target import Tally
from loadtest.targets.concertina_api import concertina_target
from loadtest.workload import Lengths, Request
from tests.loadtest.scripted import Context, Serve, Stream, keep_contract

REQUEST = Request(prompt=(1,), output_tokens=4, seed=0)


async def loop(address: str, requests: Iterator[Request], streams: int, channels: int = 1) -> Run:
    opened = concertina_target(address, "", Access(), channels=channels, timeout_s=30, keep_s=0)
    async with asyncio.timeout(60), opened as target:
        window = Window(time.perf_counter_ns())
        return await drive(target.senders, requests, streams=streams, window=window, tally=Tally())


async def test_every_stream_is_followed_by_the_next_without_waiting_for_others(
    serve: Serve,
) -> None:
    running = ended = most = 0
    last = asyncio.Event()

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        nonlocal running, ended, most
        running += 1
        most = max(most, running)
        if request.sampling.seed:
            await last.wait()
        for event in keep_contract(request):
            await asyncio.sleep(0.01)
            yield event
        running -= 1
        ended += 1
        if ended == 10:
            last.set()

    slow = Request((1,), 4, seed=1)
    run = await loop(await serve(script), iter([slow, *repeat(REQUEST, 10)]), streams=3)
    assert most == 3
    assert len(run.records) == 11 and all(record.whole for record in run.records)
    assert run.lags_ns and not run.interrupted


async def test_streams_spread_over_connections(serve: Serve) -> None:
    peers: set[str] = set()

    async def script(request: pb.GenerateRequest, context: Context) -> Stream:
        peers.add(context.peer())
        for event in keep_contract(request):
            await asyncio.sleep(0.01)
            yield event

    await loop(await serve(script), repeat(REQUEST, 6), streams=6, channels=3)
    assert len(peers) == 3


async def test_a_refused_stream_waits_before_the_next(serve: Serve) -> None:
    async def script(_: pb.GenerateRequest, __: Context) -> Stream:
        error = pb.Error(code="RESOURCE_EXHAUSTED", message="full")
        error.retry_after.FromMilliseconds(400)
        yield pb.GenerateResponse(sequence=1, error=error)

    run = await loop(await serve(script), repeat(REQUEST, 2), streams=1)
    first, second = run.records
    assert second.started_ns - first.ended_ns >= 0.39e9


async def test_a_cancelled_loop_cancels_its_streams_and_keeps_its_records(serve: Serve) -> None:
    open_streams = 0
    stuck = asyncio.Event()

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        nonlocal open_streams
        open_streams += 1
        try:
            events = keep_contract(request)
            for event in events[:2]:
                yield event
            if request.sampling.seed:
                stuck.set()
                await asyncio.sleep(60)
            for event in events[2:]:
                yield event
        finally:
            open_streams -= 1

    # The first stream ends; the two after it hang.
    requests = iter([REQUEST, *repeat(Request((1,), 4, seed=1), 9)])
    address = await serve(script)
    task = asyncio.create_task(loop(address, requests, streams=2))
    async with asyncio.timeout(30):
        await stuck.wait()
        while open_streams < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        run = await task
        while open_streams:
            await asyncio.sleep(0.01)
    assert run.interrupted
    assert sorted(record.failure for record in run.records) == ["", CANCELLED, CANCELLED]


async def test_a_stall_of_the_generator_shows_as_lag(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        time.sleep(0.5)  # the server shares the event loop of this test
        for event in keep_contract(request):
            yield event

    run = await loop(await serve(script), iter([REQUEST]), streams=1)
    # Every tick that was due during the stall is late, not only the first one.
    assert sum(lag >= 0.1e9 for lag in run.lags_ns) >= 35
    assert max(run.lags_ns) >= 0.4e9


async def test_a_bug_in_a_worker_is_raised(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in keep_contract(request):
            yield event
        await asyncio.sleep(60 * request.sampling.seed)

    def requests() -> Iterator[Request]:
        yield Request((1,), 4, seed=1)
        yield REQUEST
        raise ZeroDivisionError

    address = await serve(script)
    began = time.perf_counter()
    with pytest.raises(ZeroDivisionError):
        await loop(address, requests(), streams=2)
    assert time.perf_counter() - began < 15  # at once: the other stream would take a minute


def plan(address: str, **changes: object) -> Plan:
    given: dict[str, object] = {
        "address": address,
        "model": "",
        "streams": 2,
        "rate": None,
        "channels": 1,
        "requests": 6,
        "duration_s": None,
        "prompt_tokens": Lengths(1, 4),
        "output_tokens": Lengths(2, 5),
        "prompts": (),
        "warmup": 3,
        "seed": 7,
        "timeout_s": 30.0,
    }
    return Plan(**{**given, **changes})  # type: ignore[arg-type]


async def test_warmup_runs_first_and_does_not_count(serve: Serve) -> None:
    seeds: list[int] = []

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        seeds.append(request.sampling.seed)
        for event in keep_contract(request):
            yield event

    served, run = await measure(plan(await serve(script)), Access())
    assert served.name == "script"
    assert len(run.records) == 6 and all(record.whole for record in run.records)
    assert len(set(seeds)) == 9  # nothing that warmed the server up is asked again


async def test_an_open_loop_does_not_wait_for_anybody(serve: Serve) -> None:
    """At 100 requests a second, 60 come within a second though none ends before all have come."""
    running, last = 0, asyncio.Event()

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        nonlocal running
        running += 1
        if running == 60:
            last.set()
        await last.wait()
        for event in keep_contract(request):
            yield event

    address = await serve(script)
    async with asyncio.timeout(30):
        _, run = await measure(plan(address, rate=100.0, requests=60, warmup=0), Access())
    assert len(run.records) == 60 and all(record.whole for record in run.records)
    starts = sorted(record.due_ns for record in run.records)
    assert 0.3e9 < starts[-1] - starts[0] < 2e9
    # A Poisson process's first quartile is a fifth of its third; a clock's is as long.
    short, _, long = statistics.quantiles([b - a for a, b in pairwise(starts)])
    assert 0.05 < short / long < 0.5


async def test_a_cancelled_open_loop_cancels_its_streams_and_keeps_its_records(
    serve: Serve,
) -> None:
    stuck = asyncio.Event()
    streams = 0

    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        nonlocal streams
        streams += 1
        number = streams
        for event in keep_contract(request):
            yield event
            if number > 2:
                stuck.set()
                await asyncio.sleep(60)

    task = asyncio.create_task(
        measure(
            plan(await serve(script), rate=100.0, requests=None, duration_s=20.0, warmup=0),
            Access(),
        )
    )
    async with asyncio.timeout(15):
        await stuck.wait()
        await asyncio.sleep(0.2)
        task.cancel()
        _, run = await task
    failures = [record.failure for record in run.records]
    assert run.interrupted
    assert failures.count("") == 2 and failures.count(CANCELLED) == len(failures) - 2 >= 2


async def test_no_request_starts_after_the_duration(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in keep_contract(request):
            await asyncio.sleep(0.01)
            yield event

    address = await serve(script)
    async with asyncio.timeout(30):
        _, run = await measure(plan(address, requests=None, duration_s=0.5, warmup=0), Access())
    starts = [record.started_ns for record in run.records]
    assert 0.1e9 <= max(starts) - min(starts) <= 1e9
    assert all(record.whole for record in run.records)  # those that run may end


async def test_lengths_that_do_not_fit_the_context_are_refused(serve: Serve) -> None:
    async def script(_: pb.GenerateRequest, __: Context) -> Stream:
        raise AssertionError("nothing may be sent")
        yield

    address = await serve(script)
    with pytest.raises(InvalidRequest, match=r"context of 1024 .* up to 1029"):
        await measure(plan(address, output_tokens=Lengths(1, 1025)), Access())


async def test_what_still_runs_after_the_grace_is_cut_and_has_not_failed(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        events = keep_contract(request)
        for event in events[:2]:
            yield event
        await asyncio.sleep(60)

    address = await serve(script)
    changes = {"requests": None, "duration_s": 0.3, "grace_s": 0.3, "warmup": 0}
    began = time.perf_counter()
    async with asyncio.timeout(30):
        _, run = await measure(plan(address, **changes), Access())
    assert time.perf_counter() - began < 20
    assert [record.failure for record in run.records] == [UNFINISHED] * 2
    assert not run.interrupted


async def test_a_ramp_starts_streams_one_by_one_and_does_not_count(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in keep_contract(request):
            await asyncio.sleep(0.02)
            yield event

    address = await serve(script)
    changes = {"streams": 4, "requests": 8, "ramp_s": 0.8, "warmup": 0}
    async with asyncio.timeout(30):
        _, run = await measure(plan(address, **changes), Access())
    opens = run.window.opens_ns
    assert sum(record.due_ns >= opens for record in run.records) == 8
    began = opens - 800_000_000
    assert all(record.due_ns >= began for record in run.records)
    # A stream takes 60 ms at least: so many fit, if the last three wait for 0.2, 0.4 and 0.6 s.
    early = [record for record in run.records if record.due_ns < began + 550_000_000]
    assert 1 <= len(early) <= 10 + 6 + 3


async def test_a_request_is_due_when_the_one_before_it_ends(serve: Serve) -> None:
    async def script(request: pb.GenerateRequest, _: Context) -> Stream:
        for event in keep_contract(request):
            yield event

    run = await loop(await serve(script), repeat(REQUEST, 3), streams=1)
    for before, after in pairwise(run.records):
        assert after.due_ns == before.ended_ns

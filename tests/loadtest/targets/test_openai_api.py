"""Every way in which a server of OpenAI's API can answer, by our clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from concertina.client import InvalidRequest, ModelNotFound, ServerUnavailable
from concertina.client.channel import Access
from loadtest.record import CANCELLED, REFUSED, Record
from loadtest.target import Tally
from loadtest.targets.openai_api import openai_target
from loadtest.workload import Request
from tests.loadtest.completions import Answer, Answering, Body, completing, texts, usage

REQUEST = Request(prompt=(5, 6, 7), output_tokens=7, seed=9)


async def observe(answer: Answer, timeout_s: float = 20, key: str | None = None) -> Record:
    async with (
        completing(answer) as address,
        openai_target(address, "", Access(key), timeout_s=timeout_s) as target,
    ):
        return await target.senders[0](REQUEST, time.perf_counter_ns(), Tally())


async def test_a_whole_stream_is_timed_event_by_event() -> None:
    bodies: list[Body] = []

    async def answer(body: Body, stream: Answering) -> None:
        bodies.append(body)
        for event in texts(4):
            await asyncio.sleep(0.05)
            await stream.event(event)
        await stream.event(usage(3, 7))
        await stream.raw(": ping\n\n")
        await stream.event("[DONE]")

    record = await observe(answer)
    assert record.whole and record.stream_id == "cmpl-s" and record.prompt_tokens == 3
    # Nothing says how many tokens an event has, only how many there are.
    assert sum(record.counts) == 7 and sorted(record.counts) == [1, 2, 2, 2]
    assert record.tokens_ns[0] - record.started_ns >= 0.05e9
    gaps = [b - a for a, b in zip(record.tokens_ns, record.tokens_ns[1:], strict=False)]
    assert all(gap >= 0.03e9 for gap in gaps)
    assert record.due_ns <= record.started_ns and record.ended_ns >= record.tokens_ns[-1]
    (body,) = bodies
    assert body["prompt"] == [5, 6, 7] and body["model"] == "script"
    assert body["max_tokens"] == 7 and body["seed"] == 9 and body["ignore_eos"] is True
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}


async def test_events_that_are_torn_or_come_together_are_the_same_events() -> None:
    async def answer(_: Body, stream: Answering) -> None:
        await stream.raw('data: {"id":"cmpl-s","choices":[{"te')
        await asyncio.sleep(0.05)
        await stream.raw(
            'xt":"a"}]}\r\n\r\ndata:{"choices":[{"text":"b","finish_reason":"length"}]}'
        )
        await asyncio.sleep(0.05)
        await stream.raw('\n\ndata: {"choices":[],"usage":{"completion_tokens":7}}\n\n')
        await stream.raw("data: [DONE]\n\n")

    record = await observe(answer)
    assert record.whole and record.counts == (3, 4)


Change = Callable[[Answering], Awaitable[None]]


async def _without_done(stream: Answering) -> None:
    for event in [*texts(7), usage(3, 7)]:
        await stream.event(event)


async def _cut(stream: Answering) -> None:
    for event in texts(3):
        await stream.event(event)
    await asyncio.sleep(0.05)
    stream.cut()


async def _short(stream: Answering) -> None:
    for event in [*texts(6), usage(3, 6), "[DONE]"]:
        await stream.event(event)


async def _unfinished(stream: Answering) -> None:
    for event in [*texts(7)[:-1], usage(3, 7), "[DONE]"]:
        await stream.event(event)


async def _uncounted(stream: Answering) -> None:
    for event in [*texts(7), "[DONE]"]:
        await stream.event(event)


async def _silent(stream: Answering) -> None:
    silent = {"choices": [{"text": "", "finish_reason": "length"}]}
    for event in [silent, usage(3, 7), "[DONE]"]:
        await stream.event(event)


async def _more(stream: Answering) -> None:
    for event in [*texts(7), usage(3, 7), "[DONE]", texts(1)[0]]:
        await stream.event(event)


async def _garbage(stream: Answering) -> None:
    await stream.event("no json")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_without_done, r"without \[DONE\]"),
        (_cut, "the stream was cut"),
        (_short, "6 tokens arrived, 7 were asked for"),
        (_unfinished, "without a finish_reason"),
        (_uncounted, "without a usage"),
        (_silent, "without a text"),
        (_more, r"follows \[DONE\]"),
        (_garbage, "no completion: 'no json'"),
    ],
)
async def test_a_broken_stream_is_a_violation(write: Change, says: str) -> None:
    async def answer(_: Body, stream: Answering) -> None:
        await write(stream)

    record = await observe(answer)
    assert not record.failure and not record.whole
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(record.violation)


async def test_an_error_event_is_a_failure() -> None:
    async def answer(_: Body, stream: Answering) -> None:
        await stream.event(texts(2)[0])
        await stream.event({"error": {"message": "no", "code": "internal"}})
        stream.cut()

    record = await observe(answer)
    assert record.failure == "Error event internal" and not record.violation


@pytest.mark.parametrize(
    ("status", "failure"), [(429, REFUSED), (400, "HTTP 400"), (503, "HTTP 503")]
)
async def test_a_refusal_is_a_failure_that_says_how_long_to_wait(status: int, failure: str) -> None:
    async def answer(_: Body, __: Answering) -> web.Response:
        return web.json_response({"error": {}}, status=status, headers={"Retry-After": "1.5"})

    record = await observe(answer)
    assert (record.failure, record.retry_after_s) == (failure, 1.5)
    assert record.accepted_ns is None


async def test_a_server_that_stalls_meets_the_timeout() -> None:
    async def answer(_: Body, stream: Answering) -> None:
        await stream.event(texts(2)[0])
        await asyncio.sleep(60)

    assert (await observe(answer, timeout_s=0.5)).failure == "DeadlineExceeded"


async def test_cancelling_the_task_ends_the_stream_and_keeps_the_record() -> None:
    async def answer(_: Body, stream: Answering) -> None:
        await stream.event(texts(2)[0])
        await asyncio.sleep(60)

    tally = Tally()
    async with (
        completing(answer) as address,
        openai_target(address, "", Access(), timeout_s=60) as target,
    ):
        task = asyncio.ensure_future(target.senders[0](REQUEST, time.perf_counter_ns(), tally))
        async with asyncio.timeout(30):
            while not tally.tokens:
                await asyncio.sleep(0.01)
            task.cancel()
            record = await task
    assert record.failure == CANCELLED and record.counts == (1,)
    assert (tally.running, tally.ended) == (0, 1)


async def test_the_key_goes_with_every_call() -> None:
    seen: list[str | None] = []

    async def answer(_: Body, stream: Answering) -> web.Response:
        seen.append(stream.request.headers.get("Authorization"))
        return web.json_response({}, status=400)

    await observe(answer, key="secret")
    assert seen == ["Bearer secret"]


async def test_the_model_is_the_only_one_or_the_one_that_is_named() -> None:
    async def answer(_: Body, __: Answering) -> None:
        raise AssertionError("nothing may be sent")

    async def served(models: list[Body], name: str) -> tuple[str, int | None]:
        async with (
            completing(answer, models) as address,
            openai_target(f"{address}/v1/", name, Access(), timeout_s=20) as target,
        ):
            return target.served.name, target.served.context

    one, two = {"id": "one", "max_model_len": 99}, {"id": "two"}
    assert await served([one], "") == ("one", 99)
    assert await served([one, two], "two") == ("two", None)
    with pytest.raises(InvalidRequest, match="serves 2 models: choose one with --model"):
        await served([one, two], "")
    with pytest.raises(ModelNotFound, match="serves no model 'three', but one, two"):
        await served([one, two], "three")


async def test_nobody_at_the_address_is_an_error() -> None:
    with pytest.raises(ServerUnavailable, match=r"nobody answers at http://127\.0\.0\.1:1/v1"):
        async with openai_target("127.0.0.1:1", "", Access(), timeout_s=5):
            pass

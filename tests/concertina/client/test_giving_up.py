"""When a stream is asked for again, how soon, and when it is given up; what the server is left."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import grpc
import pytest

from concertina.client import (
    AsyncClient,
    Client,
    ConcertinaError,
    DeadlineExceeded,
    Event,
    Finished,
    GenerationFailed,
    InvalidRequest,
    Overloaded,
    ServerUnavailable,
    StreamCut,
    Tokens,
)
from concertina.client.resuming import CallBroken, begin
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import session_service_pb2 as session_pb
from tests.concertina.conftest import WAIT, Fake, Status

Collect = Callable[..., list[Event]]
GONE = Status(grpc.StatusCode.UNAVAILABLE, "gone")
DELETED = session_pb.DeleteRequest(stream_id="s1")


def _blocking(address: str, **parameters: Any) -> list[Event]:
    with Client(address) as client, client.generate(**parameters) as stream:
        return list(stream)


def _asyncio(address: str, **parameters: Any) -> list[Event]:
    async def collect() -> list[Event]:
        async with AsyncClient(address) as client, client.generate(**parameters) as stream:
            return [event async for event in stream]

    return asyncio.run(asyncio.wait_for(collect(), WAIT))


@pytest.fixture(params=[_blocking, _asyncio], ids=["blocking", "asyncio"])
def collect(request: pytest.FixtureRequest) -> Collect:
    """Runs one stream to its end with one of the two clients and returns its events."""
    return request.param


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


def test_what_was_received_is_told(fake: Fake, collect: Collect) -> None:
    long = "é" * 1200
    fake.script = [
        fake.accepted(outputs=3, keep=60),
        pb.GenerateResponse(
            sequence=2, prompt_logprobs=pb.PromptLogprobs(logprobs=[pb.TokenLogprobs()] * 2)
        ),
        fake.text(3, 0, long, output=1),
        fake.text(4, 0, "ab", output=2),
        fake.finished(5, output=2),
        GONE,
    ]
    fake.scripts = [[fake.finished(6), fake.finished(7, output=1)]]
    collect(fake.address)
    assert fake.requests[1] == pb.ResumeRequest(
        stream_id="s1",
        after_sequence=5,
        cursors=[
            pb.ResumeCursor(output=0, prompt_logprobs=2),
            pb.ResumeCursor(
                output=1,
                tokens=2400,
                characters=1200,
                prompt_logprobs=2,
                last_ids=long.encode()[-1024:],
            ),
            pb.ResumeCursor(
                output=2, tokens=2, characters=2, prompt_logprobs=2, ended=True, last_ids=b"ab"
            ),
        ],
    )


def test_a_lost_answer_is_asked_for_with_the_same_key(fake: Fake, collect: Collect) -> None:
    fake.script = [GONE]
    with pytest.raises(ServerUnavailable, match=r"did not go on within 0\.3 s"):
        collect(fake.address, resume_for=0.3, seed=1)
    first, *others = fake.requests
    assert first.idempotency_key and first.keep.seconds == 60
    assert others and all(other == first for other in others)
    with pytest.raises(ServerUnavailable):
        collect(fake.address, resume_for=0.1, seed=1)
    assert fake.requests[-1].idempotency_key != first.idempotency_key


def test_without_keep_nothing_is_tried_again(fake: Fake, collect: Collect) -> None:
    fake.script = [GONE]
    with pytest.raises(ServerUnavailable):
        collect(fake.address, keep=0)
    assert not fake.requests[0].idempotency_key and not fake.requests[0].HasField("keep")
    fake.script = [fake.accepted(), fake.text(2, 0, "a"), GONE]
    with pytest.raises(StreamCut):
        collect(fake.address, keep=0)
    assert len(fake.requests) == 2
    assert not fake.releases


def test_a_server_that_does_not_keep_is_not_asked_to_resume(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(), fake.text(2, 0, "a"), GONE]
    with pytest.raises(StreamCut):
        collect(fake.address)
    assert len(fake.requests) == 1


def test_nobody_at_the_address_is_told_at_once(collect: Collect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening: connections are refused
        started = time.monotonic()
        with pytest.raises(ServerUnavailable, match="start one"):
            collect(f"127.0.0.1:{taken.getsockname()[1]}")
    assert time.monotonic() - started < 10


def test_tries_are_spread_and_end(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "a"), GONE]
    fake.scripts = [[GONE]]
    with pytest.raises(
        StreamCut, match=r"after event 2 .*UNAVAILABLE: gone; .*within 1.5 s"
    ) as cut:
        collect(fake.address, resume_for=1.5)
    assert cut.value.stream_id == "s1"
    assert 2 <= len(fake.times) - 1 <= 25  # without waits, there would be hundreds
    assert 0.2 < fake.times[-1] - fake.times[0] < 5
    gaps = [later - earlier for earlier, later in pairwise(fake.times)]
    assert max(gaps) > 0.1


def test_progress_begins_the_count_anew(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(keep=60), GONE]
    fake.scripts = [[fake.text(2 + i, i, "a"), GONE] for i in range(20)]
    fake.scripts.append([fake.finished(22)])
    # Each of the waits is a tenth of a second at most, all of them together are more.
    events = collect(fake.address, resume_for=0.5)
    assert text_of(events) == "a" * 20


def test_a_server_that_is_full_is_asked_when_it_says(fake: Fake, collect: Collect) -> None:
    full = fake.error(3, "RESOURCE_EXHAUSTED", "64 streams wait", retry_after_ms=700)
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "a"), GONE]
    fake.scripts = [
        [full, Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "64 streams wait")],
        [fake.text(3, 1, "b"), fake.finished(4)],
    ]
    assert text_of(collect(fake.address)) == "ab"
    assert 0.69 < fake.times[2] - fake.times[1] < 2


def test_a_full_server_is_given_up_as_well(fake: Fake, collect: Collect) -> None:
    full = fake.error(2, "RESOURCE_EXHAUSTED", "64 streams wait", retry_after_ms=200)
    fake.script = [fake.accepted(keep=60), GONE]
    fake.scripts = [[full]]
    with pytest.raises(StreamCut, match="64 streams wait; it did not go on") as cut:
        collect(fake.address, resume_for=1)
    assert cut.value.code == "RESOURCE_EXHAUSTED"
    assert len(fake.requests) > 2


def test_a_first_refusal_is_the_callers(fake: Fake, collect: Collect) -> None:
    fake.script = [
        fake.error(1, "RESOURCE_EXHAUSTED", "64 streams wait"),
        Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "64 streams wait"),
    ]
    with pytest.raises(Overloaded):
        collect(fake.address)
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("code", "durable", "says"),
    [
        ("ABORTED", False, "ABORTED: so it is"),
        ("NOT_FOUND", False, "serve with --snapshots"),
        ("NOT_FOUND", True, "NOT_FOUND: so it is"),
        ("INVALID_ARGUMENT", False, "so it is"),
        ("DATA_LOSS", False, "so it is"),
        ("UNIMPLEMENTED", False, "so it is"),
        ("PERMISSION_DENIED", False, "so it is"),
    ],
)
def test_some_answers_are_final(
    fake: Fake, collect: Collect, code: str, durable: bool, says: str
) -> None:
    fake.script = [fake.accepted(keep=60, durable=durable), fake.text(2, 0, "a"), GONE]
    fake.scripts = [[Status(grpc.StatusCode[code], "so it is")]]
    with pytest.raises(StreamCut, match=says) as cut:
        collect(fake.address)
    assert cut.value.code == code
    assert len(fake.requests) == 2


def test_another_reader_keeps_the_stream(fake: Fake, collect: Collect) -> None:
    aborted = fake.error(3, "ABORTED", "another reader has it")
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "a"), aborted]
    with pytest.raises(GenerationFailed, match="another reader") as failed:
        collect(fake.address)
    assert failed.value.code == "ABORTED"
    fake.script[-1] = Status(grpc.StatusCode.ABORTED, "another reader has it")
    with pytest.raises(StreamCut, match="another reader"):
        collect(fake.address)
    assert len(fake.requests) == 2
    assert not fake.releases


def test_a_failed_step_stays_a_failure(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(keep=60, durable=True), fake.text(2, 0, "a"), fake.error(3)]
    with pytest.raises(GenerationFailed, match="it broke"):
        collect(fake.address)
    assert len(fake.requests) == 1
    assert fake.releases == [DELETED]


def test_a_durable_stream_leaves_a_server_that_stops(fake: Fake, collect: Collect) -> None:
    stopped = fake.error(2, "UNAVAILABLE", "stopping", retry_after_ms=1)
    fake.script = [fake.accepted(keep=60, durable=True), stopped]
    fake.scripts = [[fake.text(2, 0, "a"), fake.finished(3)]]
    assert text_of(collect(fake.address)) == "a"
    fake.script[0] = fake.accepted(keep=60)
    with pytest.raises(GenerationFailed, match="stopping"):
        collect(fake.address)


@pytest.mark.parametrize("accepted", [True, False])
def test_the_timeout_is_for_all_tries_together(
    fake: Fake, collect: Collect, accepted: bool
) -> None:
    fake.script = [fake.accepted(keep=60), GONE] if accepted else [GONE]
    fake.scripts = [[GONE]]
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        collect(fake.address, timeout=0.5)
    assert 0.45 < time.monotonic() - started < 8
    fake.script = [fake.accepted(keep=60), GONE]
    fake.scripts = [[fake.never]]
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        collect(fake.address, timeout=0.5)
    assert 0.45 < time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("parameters", "releases"),
    [({}, [DELETED]), ({"keep": 30}, []), ({"keep": 0}, [])],
    ids=["default", "kept", "not kept"],
)
def test_what_ended_is_forgotten_unless_it_was_to_be_kept(
    fake: Fake, collect: Collect, parameters: Any, releases: Any
) -> None:
    keep = parameters.get("keep", 60)
    fake.script = [fake.accepted(keep=keep), fake.finished(2)]
    collect(fake.address, **parameters)
    assert fake.releases == releases


def test_what_was_paused_is_kept(fake: Fake, collect: Collect) -> None:
    fake.script = [fake.accepted(keep=60), fake.finished(2, pb.FINISH_REASON_PAUSED)]
    (_, end) = collect(fake.address)
    assert isinstance(end, Finished) and end.reason == "paused"
    assert not fake.releases


@pytest.mark.parametrize("keep", [None, 30])
def test_what_is_left_early_is_forgotten(fake: Fake, keep: float | None) -> None:
    fake.script = [fake.accepted(keep=60), fake.never]
    with Client(fake.address) as client:
        with client.generate(keep=keep) as stream:
            next(stream)
        stream.cancel()
        assert fake.cancelled.wait(WAIT)
    assert fake.releases == [DELETED]


async def test_what_is_left_early_is_forgotten_by_asyncio(fake: Fake) -> None:
    fake.script = [fake.accepted(keep=60), fake.never]
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        async with client.generate() as stream:
            await anext(aiter(stream))
        stream.cancel()
    assert fake.releases == [DELETED]


def test_cancel_wakes_a_stream_that_waits_to_try_again(fake: Fake) -> None:
    full = fake.error(2, "RESOURCE_EXHAUSTED", retry_after_ms=30_000)
    fake.script = [fake.accepted(keep=60), GONE]
    fake.scripts = [[full]]
    with Client(fake.address) as client:
        stream = client.generate()
        next(stream)
        threading.Timer(0.5, stream.cancel).start()
        started = time.monotonic()
        list(stream)
        assert time.monotonic() - started < 10
    assert fake.releases == [DELETED]


async def test_cancel_wakes_an_asyncio_stream_too(fake: Fake) -> None:
    full = fake.error(2, "RESOURCE_EXHAUSTED", retry_after_ms=30_000)
    fake.script = [fake.accepted(keep=60), GONE]
    fake.scripts = [[full]]
    async with asyncio.timeout(10), AsyncClient(fake.address) as client:
        stream = client.generate()
        asyncio.get_running_loop().call_later(0.5, stream.cancel)
        _ = [event async for event in stream]
    assert fake.releases == [DELETED]


async def test_a_task_that_was_cancelled_can_read_on(fake: Fake) -> None:
    fake.script = [fake.accepted(keep=60), fake.never]
    fake.scripts = [[fake.text(2, 0, "a"), fake.finished(3)]]
    async with asyncio.timeout(WAIT), AsyncClient(fake.address) as client:
        stream = client.generate()
        await anext(aiter(stream))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(stream)
        assert text_of([event async for event in stream]) == "a"
        assert stream.resumed == 1


def test_keep_must_be_a_number(fake: Fake) -> None:
    with Client(fake.address) as client, pytest.raises(InvalidRequest, match="keep is nan s"):
        client.generate(keep=float("nan"))


def test_a_continued_session_is_paused_when_it_is_left(fake: Fake) -> None:
    fake.script = [fake.accepted(keep=60), fake.text(2, 0, "a"), GONE]
    fake.scripts = [[fake.text(3, 1, "b"), fake.never]]
    with (
        Client(fake.address) as client,
        client.sessions.continue_("s1", "more", max_tokens=5, seed=2) as stream,
    ):
        assert text_of([next(stream) for _ in range(3)]) == "ab"
        assert stream.resumed == 1
    assert fake.requests[0] == session_pb.ContinueRequest(
        stream_id="s1",
        prompt=pb.Prompt(text="more"),
        stopping=pb.StoppingCriteria(max_tokens=5),
        sampling=pb.SamplingParameters(seed=2),
    )
    assert fake.releases == [session_pb.PauseRequest(stream_id="s1")]


def test_a_session_that_may_not_have_gone_on_is_not_asked_twice(fake: Fake) -> None:
    fake.script = [GONE]
    with Client(fake.address) as client, pytest.raises(ConcertinaError, match="gone"):
        list(client.sessions.continue_("s1"))
    assert len(fake.requests) == 1


def test_waits_are_random_and_grow_to_a_limit() -> None:
    resumption = begin("server", "a", {}, timeout=None, keep=60, resume_for=float("inf"))
    broken = CallBroken(ConcertinaError("gone"))
    waits = [resumption.wait_s(broken) for _ in range(2000)]
    assert 0 <= waits[0] <= 0.1
    assert max(waits[:4]) <= 0.8
    assert 4.5 < max(waits) <= 5
    assert len(set(waits)) == len(waits)
    asked = CallBroken(ConcertinaError("full", retry_after=30.0))
    assert 30 <= resumption.wait_s(asked) <= 35


def test_no_wait_goes_past_the_timeout() -> None:
    resumption = begin("server", "a", {}, timeout=10, keep=60, resume_for=None)
    asked = CallBroken(ConcertinaError("full", retry_after=30.0))
    assert 9 < resumption.wait_s(asked) <= 10

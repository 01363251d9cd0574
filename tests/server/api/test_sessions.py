"""The API of sessions."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from concertina.v1 import generation_service_pb2 as generation_pb
from concertina.v1 import session_service_pb2 as pb
from server.api.sessions import SessionServicer
from server.auth.api_keys import Callers
from server.bundles.bundle import Bundle
from tests.server.engines import Gate, is_empty, until
from tests.server.replicas import Replica
from tests.server.sessions.test_registry import (
    Cluster,
    Received,
    cluster,
    read,
    request,
    whole,
)

__all__ = ["cluster"]  # a fixture


class Refused(Exception):
    """A call that ended with a status other than OK."""


class Context:
    """The context of one call."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return ()

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_trailing_metadata(self, trailing_metadata: object) -> None:
        pass

    def set_details(self, details: str) -> None:
        self.details = details

    def check(self) -> None:
        if self.code is not None:
            raise Refused(f"{self.code.name}: {self.details}")


class Caller:
    """Calls a replica, and raises Refused."""

    def __init__(self, sessions: Replica) -> None:
        self.sessions = sessions
        self._servicer = SessionServicer(sessions.registry, sessions.opener, Callers(None))

    async def call(self, method: str, **fields: Any) -> Any:
        context = Context()
        answer = await getattr(self._servicer, method)(
            getattr(pb, f"{method}Request")(**fields), context
        )
        context.check()
        return answer

    async def stream(self, method: str, **fields: Any) -> list[Any]:
        context = Context()
        wanted = getattr(pb, f"{method}Request")(**fields)
        events = [event async for event in getattr(self._servicer, method)(wanted, context)]
        context.check()
        return events

    async def bring(self, parts: Sequence[pb.ImportRequest]) -> pb.Session:
        async def send() -> AsyncIterator[pb.ImportRequest]:
            for part in parts:
                yield part

        context = Context()
        answer = await self._servicer.Import(send(), context)
        context.check()
        assert answer is not None
        return answer.session

    async def generate(self, wanted: generation_pb.GenerateRequest) -> Received:
        got = Received()
        await read(await self.sessions.start(wanted), got, 9)
        return got

    async def continue_session(self, got: Received, first: int, **fields: Any) -> Received:
        """Continues a session and reads its events."""
        then = Received()
        for event in await self.stream("Continue", stream_id=got.stream_id, **fields):
            then.take(event, first)
        return then


async def paused(caller: Caller, wanted: generation_pb.GenerateRequest, after: int) -> Received:
    """A stream that is paused while it generates."""
    model, got = caller.sessions.model, Received()
    with Gate(model) as gate:
        attachment = await caller.sessions.start(wanted)
        gate.let(after)
        await gate.held("step")
        stream_id = attachment.session.lease.stream_id
        pausing = asyncio.create_task(caller.call("Pause", stream_id=stream_id))
        await until(lambda: model.engine.num_actions)
        gate.let(1)
        answer = await pausing
        gate.let(float("inf"))
        await read(attachment, got, 9)
    assert answer.session.phase == pb.SESSION_PHASE_PAUSED
    assert 0 < answer.session.generated_tokens == len(got.ids[0]) < 80
    assert got.endings[0].reason == generation_pb.FINISH_REASON_PAUSED
    return got


PENALTIES = {"seed": 4, "frequency_penalty": 0.9, "repetition_penalty": 1.2}
GRAMMAR = {"seed": 4, "grammar": {"regex": "([a-z]{3}[0-9]){40}"}}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("sampling", [{"seed": 4}, PENALTIES, GRAMMAR])
async def test_a_pause_changes_no_output(
    cluster: Cluster, sampling: dict[str, Any], elsewhere: bool
) -> None:
    wanted = request(80, sampling=sampling)
    last = Caller(cluster())
    expected = await whole(last.sessions, wanted)
    first = Caller(cluster())
    got = await paused(first, wanted, 21)
    assert not first.sessions.model.engine.placement.running
    if elsewhere:
        first.sessions.kill()
        first = last
    then = await first.continue_session(got, 9 + len(got.ids[0]))
    assert got.ids[0] + then.ids[0] == expected.ids[0]
    assert got.texts[0] + then.texts[0] == expected.texts[0]
    assert then.endings[0].reason == expected.endings[0].reason
    await first.call("Delete", stream_id=got.stream_id)


async def test_a_paused_stream_continues_only_with_a_grammar_that_fits(cluster: Cluster) -> None:
    caller = Caller(cluster())
    got = await paused(caller, request(80, sampling=GRAMMAR), 21)
    with pytest.raises(Refused, match=r"INVALID_ARGUMENT: sampling.grammar does not allow"):
        await caller.stream(
            "Continue", stream_id=got.stream_id, sampling={"grammar": {"regex": "[a-z]*"}}
        )
    then = await caller.continue_session(
        got, 9 + len(got.ids[0]), sampling={"grammar": {"regex": "[a-z0-9]{60}"}}
    )
    text = got.texts[0] + then.texts[0]
    assert len(text) == 60 and then.endings[0].reason == generation_pb.FINISH_REASON_END
    assert re.fullmatch("([a-z]{3}[0-9])*[a-z]{0,3}", got.texts[0])
    assert re.fullmatch("[a-z0-9]*", text)


async def test_a_reader_resumes_after_a_pause_and_a_lost_connection(cluster: Cluster) -> None:
    wanted = request(80)
    caller = Caller(cluster())
    expected = await whole(caller.sessions, wanted)
    got = await paused(caller, wanted, 21)
    before, then = len(got.ids[0]), Received()
    events = await caller.stream("Continue", stream_id=got.stream_id)
    for event in events[:3]:
        then.take(event, 9 + before)
    attachment = await caller.sessions.resume(got.stream_id, "", then.cursors(1))
    await read(attachment, then, 9 + before)
    assert got.ids[0] + then.ids[0] == expected.ids[0]
    assert got.texts[0] + then.texts[0] == expected.texts[0]


async def test_a_continued_session_is_held_once(cluster: Cluster) -> None:
    caller = Caller(cluster())
    got = await paused(caller, request(80), 21)
    await caller.continue_session(got, 9 + len(got.ids[0]))
    await caller.call("Delete", stream_id=got.stream_id)
    await until(lambda: is_empty(caller.sessions.model), 5)


async def test_a_continued_stream_resumes_on_another_replica(cluster: Cluster) -> None:
    """Even if the replica that continued it dies before its next snapshot."""
    wanted = request(80)
    last = Caller(cluster())
    expected = await whole(last.sessions, wanted)
    first = Caller(cluster(snapshot_interval=1_000))
    got = await paused(first, wanted, 21)
    before, then = len(got.ids[0]), Received()
    with Gate(first.sessions.model) as gate:
        going = asyncio.create_task(first.stream("Continue", stream_id=got.stream_id))
        gate.let(5)
        await gate.held("step")
        first.sessions.die()
        gate.let(float("inf"))
        for event in (await going)[:3]:
            then.take(event, 9 + before)
    first.sessions.kill()
    attachment = await last.sessions.resume(got.stream_id, "", then.cursors(1))
    await read(attachment, then, 9 + before)
    assert got.ids[0] + then.ids[0] == expected.ids[0]
    assert got.texts[0] + then.texts[0] == expected.texts[0]


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_added_prompt_tokens_need_no_prefill_of_the_former_ones(
    cluster: Cluster, text: Bundle, elsewhere: bool
) -> None:
    """The tokens are those of a request whose prompt has all tokens."""
    caller = Caller(cluster())
    got = await caller.generate(request(30))
    if elsewhere:
        caller.sessions.kill()
        caller = Caller(cluster())
    model = caller.sessions.model
    pushed = 0
    prefill = model.engine.cache.prefill

    def count(tokens: Any, logits: bool = False) -> Any:
        nonlocal pushed
        pushed += len(tokens)
        return prefill(tokens, logits)

    model.engine.cache.prefill = count  # type: ignore[method-assign]
    then = await caller.continue_session(
        got, 9 + 30 + 5, prompt={"text": " and "}, stopping={"max_tokens": 20}
    )
    assert pushed == 5  # the last former token, and all but the last new one
    ids = [*b"An abacus", *got.ids[0], *b" and "]
    fresh = request(20, prompt={"tokens": {"ids": ids}})
    direct = await whole(caller.sessions, fresh, len(ids))
    assert then.ids == direct.ids
    assert then.texts == direct.texts


async def test_forks_share_the_past_tokens_and_differ_in_later_ones(cluster: Cluster) -> None:
    caller = Caller(cluster())
    got = await caller.generate(request(30))
    forked = (await caller.call("Fork", stream_id=got.stream_id, n=3)).stream_ids
    assert len(set(forked)) == 3
    model = caller.sessions.model
    states = [model.find(name, "").streams[0].saved for name in (got.stream_id, *forked)]  # type: ignore[union-attr]
    assert all(state is states[0] for state in states)
    outcomes = [
        await caller.continue_session(Received(name), 9 + 30, stopping={"max_tokens": 20})
        for name in forked
    ]
    assert len({tuple(each.ids[0]) for each in outcomes}) == 3
    caller.sessions.kill()
    second = Caller(cluster())
    again = Received(forked[0], 1)
    await read(await second.sessions.resume(forked[0], "", again.cursors(1)), again, 9 + 30)
    assert again.ids == outcomes[0].ids


async def test_a_session_is_exported_and_imported(cluster: Cluster) -> None:
    first, second = Caller(cluster()), Caller(cluster())
    wanted = request(80)
    expected = await whole(first.sessions, wanted)
    got = await paused(first, wanted, 21)
    parts = await first.stream("Export", stream_id=got.stream_id)
    sent = [pb.ImportRequest(part=part.part, sha256=part.sha256) for part in parts]
    brought = await second.bring(sent)
    assert brought.stream_id != got.stream_id
    assert brought.phase == pb.SESSION_PHASE_PAUSED
    then = await second.continue_session(Received(brought.stream_id), 9 + len(got.ids[0]))
    assert got.ids[0] + then.ids[0] == expected.ids[0]


@pytest.mark.parametrize("fault", ["changed", "cut", "checksum", "large"])
async def test_a_damaged_export_is_refused(cluster: Cluster, fault: str) -> None:
    caller = Caller(cluster())
    got = await caller.generate(request(30))
    (part,) = await caller.stream("Export", stream_id=got.stream_id)
    content = part.part
    if fault == "changed":
        content = content[:-1] + bytes([content[-1] ^ 1])
    if fault == "cut":
        content = content[:-1]
    if fault == "large":
        content = bytes(1024 * 1024 + 1)
    digest = part.sha256 if fault == "checksum" else hashlib.sha256(content).digest()
    if fault == "checksum":
        digest = bytes(32)
    expected = {"changed": "DATA_LOSS", "cut": "DATA_LOSS"}.get(fault, "INVALID_ARGUMENT")
    with pytest.raises(Refused, match=expected):
        await caller.bring([pb.ImportRequest(part=content, sha256=digest)])
    with pytest.raises(Refused, match=r"INVALID_ARGUMENT|DATA_LOSS"):
        await caller.bring([])


async def test_sessions_are_listed_by_page(cluster: Cluster) -> None:
    first, second = Caller(cluster()), Caller(cluster())
    names = sorted([(await first.generate(request(10))).stream_id for _ in range(5)])
    await until(lambda: first.sessions.model.table.num_left == 5)
    page = await first.call("ListSessions", page_size=3)
    assert [session.stream_id for session in page.sessions] == names[:3]
    assert {session.phase for session in page.sessions} == {pb.SESSION_PHASE_FINISHED}
    assert all(session.state_bytes > 0 for session in page.sessions)
    assert all(session.expires.seconds > 0 for session in page.sessions)
    rest = await first.call("ListSessions", page_size=3, page_token=page.next_page_token)
    assert [session.stream_id for session in rest.sessions] == names[3:]
    assert not rest.next_page_token
    assert first.sessions.snapshots is not None
    first.sessions.snapshots.flush(10)
    stored = (await second.call("ListSessions")).sessions
    assert [session.stream_id for session in stored] == names
    assert {session.phase for session in stored} == {pb.SESSION_PHASE_STORED}
    for name in names:
        await second.call("Delete", stream_id=name)
        await first.call("Delete", stream_id=name)
    assert not (await first.call("ListSessions")).sessions
    await until(lambda: is_empty(first.sessions.model))
    with pytest.raises(Refused, match="page_size is 1001"):
        await first.call("ListSessions", page_size=1001)


async def test_a_running_or_failed_session_cannot_continue(cluster: Cluster) -> None:
    caller = Caller(cluster())
    model = caller.sessions.model
    with Gate(model) as gate:
        attachment = await caller.sessions.start(request(80))
        name = attachment.session.lease.stream_id
        for call in (
            caller.call("Fork", stream_id=name, n=1),
            caller.stream("Continue", stream_id=name),
            caller.stream("Export", stream_id=name),
        ):
            with pytest.raises(Refused, match=r"FAILED_PRECONDITION: the stream is running: pause"):
                await call
        gate.let(float("inf"))
        await model.forget(attachment.session)
    wanted = request(80)
    wanted.ClearField("keep")
    with Gate(model) as gate:
        attachment = await caller.sessions.start(wanted)
        name = attachment.session.lease.stream_id
        with pytest.raises(Refused, match=r"FAILED_PRECONDITION: .*set keep in its request"):
            await caller.call("Pause", stream_id=name)
        gate.let(float("inf"))
        await model.forget(attachment.session)


async def test_wrong_calls_are_refused_with_the_reason(cluster: Cluster) -> None:
    caller = Caller(cluster())
    got = await caller.generate(request(10, output={"n": 2}))
    for n in (0, 129):
        with pytest.raises(Refused, match=f"INVALID_ARGUMENT: n is {n}"):
            await caller.call("Fork", stream_id=got.stream_id, n=n)
    with pytest.raises(Refused, match="FAILED_PRECONDITION: the stream has 2 outputs"):
        await caller.stream("Continue", stream_id=got.stream_id)
    for method in ("Pause", "Delete"):
        if method == "Pause":
            with pytest.raises(Refused, match="NOT_FOUND"):
                await caller.call(method, stream_id="nothing")
    one = await caller.generate(request(10))
    with pytest.raises(Refused, match="INVALID_ARGUMENT: prompt must be text or tokens"):
        await caller.stream("Continue", stream_id=one.stream_id, prompt={"label": "x"})
    with pytest.raises(Refused, match=r"INVALID_ARGUMENT: stopping.max_tokens is 96"):
        await caller.stream("Continue", stream_id=one.stream_id, stopping={"max_tokens": 96})


async def test_states_of_ended_sessions_have_a_limit(cluster: Cluster, text: Bundle) -> None:
    size = sum(text.state_bytes(9 + 20).values())
    caller = Caller(cluster(session_bytes=3 * size))
    names = [(await caller.generate(request(20))).stream_id for _ in range(5)]
    model = caller.sessions.model

    def held() -> list[bool]:
        return [model.find(name, "") is not None for name in names]

    await until(lambda: held() == [False] * 2 + [True] * 3)
    # Sessions deleted from memory are still in the store.
    then = await caller.continue_session(Received(names[0]), 9 + 20, stopping={"max_tokens": 5})
    assert len(then.ids[0]) == 5

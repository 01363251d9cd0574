"""Streams that lose their reader, their engine, or both, continue without a difference."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from concertina.v1 import generation_service_pb2 as pb
from server.api.generation import send
from server.api.limits import require_within_limits
from server.api.validate import resume_request
from server.auth.api_keys import Caller
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.restore import BEGINNING, ResumeCursor
from server.engine.stream import Stream
from server.errors import (
    EngineStopped,
    InvalidRequest,
    SnapshotRefused,
    UnknownModel,
    UnknownSession,
)
from server.sessions import reviver
from server.sessions.registry import Attachment, SessionRegistry, hand_over
from tests.server.engines import LIMIT_S, Gate, is_empty, until
from tests.server.replicas import Replica

KEEP = {"keep": {"seconds": 60}}


@dataclass
class Received:
    """What a client has received of a stream."""

    stream_id: str = ""
    sequence: int = 0
    outputs: dict[int, pb.ResumeCursor] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    prompt: list[float] = field(default_factory=list)
    endings: dict[int, pb.Finished] = field(default_factory=dict)
    handed_over: bool = False

    def take(self, event: pb.GenerateResponse, first: int) -> None:
        """Adds one event. Checks that it follows the ones before."""
        assert event.sequence == self.sequence + 1
        self.sequence += 1
        output = event.output
        match event.WhichOneof("event"):
            case "accepted":
                self.stream_id = event.accepted.stream_id
            case "tokens":
                ids = self.ids.setdefault(output, [])
                assert output not in self.endings
                assert event.tokens.first_position == first + len(ids)
                ids += event.tokens.ids
                self.texts[output] = self.texts.get(output, "") + event.tokens.text
                logprobs = self.logprobs.setdefault(output, [])
                logprobs += [one.logprob for one in event.tokens.logprobs]
            case "prompt_logprobs":
                assert event.prompt_logprobs.first_position == len(self.prompt)
                self.prompt += [one.logprob for one in event.prompt_logprobs.logprobs]
            case "finished":
                assert output not in self.endings
                self.endings[output] = event.finished
            case "handed_over":
                self.handed_over = True
            case other:
                raise AssertionError(f"{other}: {event.error.message}")

    def cursors(self, outputs: int, ids: bool = False) -> list[ResumeCursor]:
        """The resume cursors of this client."""
        return [
            ResumeCursor(
                len(self.ids.get(output, [])),
                len(self.texts.get(output, "")),
                len(self.prompt),
                output in self.endings,
                tuple(self.ids.get(output, [])) if ids else (),
            )
            for output in range(outputs)
        ]

    @property
    def content(self) -> tuple[object, ...]:
        """Everything that must not depend on interruptions."""
        ends = {o: (e.reason, e.stop, e.usage.generated_tokens) for o, e in self.endings.items()}
        logs = {o: [round(x, 3) for x in logprobs] for o, logprobs in self.logprobs.items()}
        return self.ids, self.texts, logs, [round(x, 3) for x in self.prompt], ends


async def read(
    attachment: Attachment, got: Received, first: int, events: int | None = None
) -> None:
    """Reads `events` events of a stream, or all of them, and disconnects."""
    sent = send(attachment, got.sequence, durable=False)
    async with asyncio.timeout(LIMIT_S):
        async for event in sent:
            got.take(event, first)
            if events is not None and (events := events - 1) <= 0:
                break
        await sent.aclose()


Cluster = Callable[..., Replica]


@pytest.fixture
async def cluster(text: Bundle, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Starts replicas that share a store."""
    replicas: list[Replica] = []

    def start(**settings: Any) -> Replica:
        config = EngineConfig(threads=1, **{"snapshot_interval": 8, "slots": 4, **settings})
        replicas.append(Replica(text, config, f"file://{tmp_path}/store"))
        return replicas[-1]

    yield start
    for replica in replicas:
        replica.close()


def request(max_tokens: int = 40, **fields: Any) -> pb.GenerateRequest:
    fields.setdefault("sampling", {"seed": 3})
    prompt = fields.pop("prompt", {"text": "An abacus"})
    return pb.GenerateRequest(
        prompt=prompt, stopping={"max_tokens": max_tokens}, **{**KEEP, **fields}
    )


async def whole(sessions: Replica, wanted: pb.GenerateRequest, first: int = 9) -> Received:
    """Reads a stream without interruption."""
    got = Received()
    await read(await sessions.start(wanted), got, first)
    await sessions.delete(got.stream_id, "")
    return got


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"sampling": {"temperature": 0}},
    "penalised": {
        "sampling": {
            "seed": 3,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.7,
            "bad_words": ["e", "th"],
        }
    },
    "reported": {"output": {"logprobs": 2, "prompt_logprobs": 1}},
    "several": {"output": {"n": 3}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("events", [1, 5])
async def test_a_reader_resumes(cluster: Cluster, case: str, events: int) -> None:
    sessions = cluster()
    wanted = request(**CASES[case])
    expected = await whole(sessions, wanted)
    got, outputs = Received(), max(1, wanted.output.n)
    await read(await sessions.start(wanted), got, 9, events)
    while len(got.endings) < outputs:
        cursors = got.cursors(outputs)
        await read(await sessions.resume(got.stream_id, "", cursors), got, 9, events)
    assert got.content == expected.content


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("events", "ids"), [(1, False), (9, True), (20, False)])
async def test_another_replica_continues(
    cluster: Cluster, case: str, events: int, ids: bool
) -> None:
    """The first one dies at any event, and another one after it."""
    wanted = request(**CASES[case])
    last = cluster()
    expected = await whole(last, wanted)
    got, outputs = Received(), max(1, wanted.output.n)
    first = cluster()
    await read(await first.start(wanted), got, 9, events)
    first.kill()
    second = cluster()
    cursors = got.cursors(outputs, ids)
    await read(await second.resume(got.stream_id, "", cursors), got, 9, events)
    second.kill()
    await read(await last.resume(got.stream_id, "", got.cursors(outputs, ids)), got, 9)
    assert got.content == expected.content


async def test_a_partial_stop_string_is_completed_elsewhere(cluster: Cluster) -> None:
    plain = await whole(cluster(), request(60, sampling={"seed": 5}))
    text = plain.texts[0]
    stop = text[30:36]
    at = text.index(stop)
    wanted = request(60, sampling={"seed": 5})
    wanted.stopping.stop.append(stop)
    first, second, got = cluster(), cluster(), Received()
    with Gate(first.model) as gate:
        attachment = await first.start(wanted)
        gate.let(at + 5)  # the prompt is one pass or two
        await asyncio.sleep(0.2)
        await read(attachment, got, 9, 2)
        gate.let(float("inf"))
        await until(lambda: attachment.session.ended)
        first.kill()
    await read(await second.resume(got.stream_id, "", got.cursors(1)), got, 9)
    assert got.texts[0] == text[:at]
    assert got.endings[0].stop == stop


async def test_an_ended_stream_is_sent_again(cluster: Cluster) -> None:
    first, second = cluster(), cluster()
    wanted = request()
    got = Received()
    attachment = await first.start(wanted)
    await read(attachment, got, 9, 2)
    await until(lambda: attachment.session.ended)
    first.kill()
    for _ in range(2):
        again = replace(got, ids={0: list(got.ids.get(0, []))}, texts=dict(got.texts), endings={})
        await read(await second.resume(got.stream_id, "", got.cursors(1)), again, 9)
        assert len(again.ids[0]) == 40
        assert again.endings[0].usage.generated_tokens == 40


async def test_a_used_idempotency_key_attaches(cluster: Cluster) -> None:
    first, second = cluster(), cluster()
    wanted = request(idempotency_key="once")
    wanted.sampling.ClearField("seed")
    got, again, elsewhere = Received(), Received(), Received()
    await read(await first.start(wanted), got, 9, 4)
    await read(await first.start(wanted), again, 9)
    assert again.stream_id == got.stream_id
    assert again.ids[0][: len(got.ids[0])] == got.ids[0]
    first.kill()
    await read(await second.start(wanted), elsewhere, 9)
    assert elsewhere.content == again.content
    other = await second.start(request(idempotency_key="other"))
    assert other.session.lease.stream_id != got.stream_id
    second_owner = await second.start(wanted, Caller("somebody else"))
    assert second_owner.session.lease.stream_id != got.stream_id
    for attachment in (other, second_owner):
        await second.model.forget(attachment.session)
    held = second.model.find(got.stream_id, "")
    assert held is not None
    subscribers = held.subscribers
    with pytest.raises(InvalidRequest, match="idempotency_key"):
        await second.start(request(39, idempotency_key="once"))
    assert held.subscribers == subscribers  # they are still attached


async def test_streams_are_handed_over(cluster: Cluster) -> None:
    wanted = request(80)
    last = cluster()
    expected = await whole(last, wanted)
    first, got = cluster(), Received()
    with Gate(first.model) as gate:
        attachment = await first.start(wanted)
        gate.let(30)
        await gate.held("step")
        handing = asyncio.create_task(hand_over([first.model], first.snapshots))
        reading = asyncio.create_task(read(attachment, got, 9))
        await asyncio.sleep(0.05)
        gate.let(1)
        await asyncio.wait_for(asyncio.gather(handing, reading), LIMIT_S)
    assert got.handed_over
    assert not got.endings
    await until(lambda: is_empty(first.model))
    assert 0 < len(got.ids[0]) < 80
    with pytest.raises(EngineStopped):  # or the stream would continue where it was
        await first.resume(got.stream_id, "", got.cursors(1))
    await read(await last.resume(got.stream_id, "", got.cursors(1)), got, 9)
    assert got.content == expected.content


async def test_only_the_owner_finds_a_stream(cluster: Cluster) -> None:
    sessions, got = cluster(), Received()
    await read(await sessions.start(request(), Caller("me")), got, 9, 3)
    for owner in ("", "you"):
        with pytest.raises(UnknownSession):
            await sessions.resume(got.stream_id, owner, [])
        await sessions.delete(got.stream_id, owner)
    await read(await sessions.resume(got.stream_id, "me", got.cursors(1)), got, 9)
    assert got.endings


async def test_a_call_during_a_delete_does_not_revive_the_stream(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the delete, and does not find the stream then."""
    sessions, got, loop = cluster(), Received(), asyncio.get_running_loop()
    await read(await sessions.start(request()), got, 9)
    snapshots, calls = sessions.snapshots, list[Any]()
    assert snapshots.flush(LIMIT_S) == 0
    forget = snapshots.forget

    def slow_to_forget(owner: str, stream_id: str) -> None:
        """Another call comes between the model's deletion and the store's."""
        back = reviver.find_or_revive(sessions.registry, stream_id, Caller(owner))
        calls.append(asyncio.run_coroutine_threadsafe(back, loop))
        time.sleep(0.05)
        forget(owner, stream_id)

    monkeypatch.setattr(snapshots, "forget", slow_to_forget)
    await sessions.delete(got.stream_id, "")
    with pytest.raises(UnknownSession):
        await asyncio.wait_for(asyncio.wrap_future(calls[0]), LIMIT_S)
    assert is_empty(sessions.model)


@pytest.mark.parametrize("stream_id", ["", "no-such-stream", "../../etc", "a/b", "\0"])
async def test_a_missing_stream_is_unknown(cluster: Cluster, stream_id: str) -> None:
    sessions = cluster()
    with pytest.raises(UnknownSession):
        await sessions.resume(stream_id, "", [])
    await sessions.delete(stream_id, "")


async def test_a_stream_is_deleted_when_its_keep_is_over(cluster: Cluster) -> None:
    sessions, got = cluster(stream_buffer=4), Received()
    wanted = request(80, keep={"nanos": 200_000_000})
    await read(await sessions.start(wanted), got, 9, 3)
    assert sessions.model.find(got.stream_id, "") is not None
    await until(lambda: is_empty(sessions.model), 10)


async def test_without_keep_a_stream_ends_with_its_reader(cluster: Cluster) -> None:
    sessions, got = cluster(), Received()
    wanted = request(80)
    wanted.ClearField("keep")
    await read(await sessions.start(wanted), got, 9, 3)
    await until(lambda: is_empty(sessions.model), 10)
    with pytest.raises(UnknownSession):
        await sessions.resume(got.stream_id, "", [])


async def test_a_second_reader_displaces_the_first(cluster: Cluster) -> None:
    sessions = cluster()
    with Gate(sessions.model) as gate:
        attachment = await sessions.start(request())
        gate.let(12)
        await gate.held("step")
        events = send(attachment, 0, durable=False)
        stream_id = (await anext(events)).accepted.stream_id
        attaching = asyncio.create_task(sessions.resume(stream_id, "", [BEGINNING]))
        await asyncio.sleep(0.05)
        gate.let(float("inf"))
        second = await asyncio.wait_for(attaching, LIMIT_S)
        rest = [event async for event in events]
        assert rest[-1].error.code == "ABORTED"
        got = Received(stream_id, 1)
        await read(second, got, 9)
        assert len(got.ids[0]) == 40
        await sessions.delete(stream_id, "")


async def test_a_snapshot_of_another_bundle_is_refused(cluster: Cluster, text: Bundle) -> None:
    first, got = cluster(), Received()
    await read(await first.start(request()), got, 9, 12)
    first.kill()
    second = cluster()
    model = second.model
    manifest = type(text.manifest)()
    manifest.CopyFrom(text.manifest)
    manifest.fingerprint = "0" * 64
    model.bundle = replace(text, manifest=manifest)
    with pytest.raises(SnapshotRefused, match="another bundle"):
        await second.resume(got.stream_id, "", got.cursors(1))
    model.bundle = text
    elsewhere = SessionRegistry({"other": model}, second.snapshots)
    with pytest.raises(UnknownModel):
        await reviver.resume(elsewhere, got.stream_id, Caller(""), got.cursors(1))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"after_sequence": 2**64 - 1}, "after_sequence"),
        ({"cursors": [{"tokens": 2**64 - 1}]}, r"cursors\[0\].tokens"),
        ({"cursors": [{"characters": 2**64 - 1}]}, r"cursors\[0\].characters"),
    ],
)
def test_an_impossible_cursor_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        require_within_limits(pb.ResumeRequest(stream_id="a", **fields))


@pytest.mark.parametrize(
    ("cursors", "reason"),
    [
        ([{"output": 1}, {"output": 1}], r"cursors\[1\].output is 1, as in another cursor"),
        ([{"tokens": 1, "last_ids": [2, 2]}], r"cursors\[0\].last_ids has 2 ids; it may have 1"),
    ],
)
def test_cursors_that_contradict_each_other_are_refused(cursors: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        resume_request(pb.ResumeRequest(stream_id="a", cursors=cursors))


async def test_an_invalid_token_of_a_cursor_is_not_pushed(cluster: Cluster) -> None:
    """It would fail the step of the whole batch."""
    first, second, got = cluster(snapshot_interval=1_000), cluster(), Received()
    await read(await first.start(request()), got, 9, 5)
    first.die()
    first.kill()
    cursors = [ResumeCursor(3, 3, last_ids=(1, 256, 3))]
    with pytest.raises(InvalidRequest, match=r"last_ids has 256; .* below 256"):
        await second.resume(got.stream_id, "", cursors)


async def test_an_ending_lost_with_its_replica_is_sent_to_the_next_reader(cluster: Cluster) -> None:
    """The first reader has the ending, which is not stored; the second has nothing."""
    wanted = request(40)
    last = cluster()
    expected = await whole(last, wanted)
    first, got = cluster(snapshot_interval=1_000), Received()
    with Gate(first.model) as gate:
        attachment = await first.start(wanted)
        gate.let(20)
        await gate.held("step")
        first.die()
        gate.let(float("inf"))
        await read(attachment, got, 9)
    first.kill()
    await read(await last.resume(got.stream_id, "", got.cursors(1)), got, 9)
    again = Received(got.stream_id, 1)
    await read(await last.resume(got.stream_id, "", [BEGINNING]), again, 9)
    assert again.content == expected.content


@pytest.mark.parametrize("outputs", [1, 3])
async def test_a_reader_of_a_stream_that_cannot_be_opened_gets_an_error(
    cluster: Cluster, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has ended, so that the engine has nothing of it to end."""
    first, got = cluster(), Received()
    wanted = request(output={"n": outputs})
    await read(await first.start(wanted), got, 9)
    first.kill()
    second, again = cluster(), Received(got.stream_id, 1)
    _fail_backlogs(monkeypatch, after=outputs // 2)
    attachment = await second.resume(got.stream_id)
    async with asyncio.timeout(LIMIT_S):
        events = [event async for event in send(attachment, 1, durable=False)]
    endings = [e.WhichOneof("event") for e in events if e.WhichOneof("event") != "tokens"]
    fine = outputs // 2
    assert sorted(endings) == ["error"] * (outputs - fine) + ["finished"] * fine
    errors = [event.error for event in events if event.HasField("error")]
    assert {error.code for error in errors} == {"INTERNAL"}
    monkeypatch.undo()
    await read(await second.resume(got.stream_id), again, 9)
    assert again.content == got.content


async def test_a_reader_who_cannot_attach_takes_no_place(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, got = cluster(), Received()
    with Gate(sessions.model) as gate:
        attachment = await sessions.start(request(output={"n": 2}))
        gate.let(12)
        await gate.held("step")
        reading = asyncio.create_task(read(attachment, got, 9))
        await until(lambda: got.sequence)
        _fail_backlogs(monkeypatch, after=1)
        attaching = asyncio.create_task(sessions.resume(got.stream_id))
        await asyncio.sleep(0.05)
        gate.let(float("inf"))
        with pytest.raises(MemoryError):
            await asyncio.wait_for(attaching, LIMIT_S)
        monkeypatch.undo()
        await asyncio.wait_for(reading, LIMIT_S)
    assert [len(ids) for ids in got.ids.values()] == [40, 40]
    await sessions.delete(got.stream_id)


def _fail_backlogs(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Have backlogs fail, after so many."""
    made = 0
    real = Stream.backlog.fget  # type: ignore[attr-defined]

    def backlog(stream: Stream) -> Any:
        nonlocal made
        made += 1
        if made > after:
            raise MemoryError("planted")
        return real(stream)

    monkeypatch.setattr(Stream, "backlog", property(backlog))

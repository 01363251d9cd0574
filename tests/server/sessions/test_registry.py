"""Streams that lose their reader, their engine, or both, go on as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from concertina.v1 import generation_service_pb2 as pb
from server.api.generation import send
from server.api.validate import resume_request
from server.auth.api_keys import Caller
from server.bundles.bundle import Bundle
from server.config import EngineConfig
from server.engine.restore import BEGINNING, ResumeCursor
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
class Had:
    """What a client has of a stream."""

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
        """One event; what it says must follow from those before it."""
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
                told = self.logprobs.setdefault(output, [])
                told += [one.logprob for one in event.tokens.logprobs]
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

    def received(self, outputs: int, ids: bool = False) -> list[ResumeCursor]:
        """The same, as the server is told it."""
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
        """All that counts."""
        ends = {o: (e.reason, e.stop, e.usage.generated_tokens) for o, e in self.endings.items()}
        logs = {o: [round(x, 3) for x in told] for o, told in self.logprobs.items()}
        return self.ids, self.texts, logs, [round(x, 3) for x in self.prompt], ends


async def follow(following: Attachment, had: Had, first: int, events: int | None = None) -> None:
    """Reads so many events of a stream, or all of them, and goes away."""
    sent = send(following, had.sequence, durable=False)
    async with asyncio.timeout(LIMIT_S):
        async for event in sent:
            had.take(event, first)
            if events is not None and (events := events - 1) <= 0:
                break
        await sent.aclose()


Cluster = Callable[..., Replica]


@pytest.fixture
async def cluster(text: Bundle, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Starts replicas that share a store; none may hold anything in the end."""
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


async def whole(sessions: Replica, wanted: pb.GenerateRequest, first: int = 9) -> Had:
    """An undisturbed stream."""
    had = Had()
    await follow(await sessions.start(wanted), had, first)
    await sessions.delete(had.stream_id, "")
    return had


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
async def test_a_reader_comes_back(cluster: Cluster, case: str, events: int) -> None:
    sessions = cluster()
    wanted = request(**CASES[case])
    expected = await whole(sessions, wanted)
    had, outputs = Had(), max(1, wanted.output.n)
    await follow(await sessions.start(wanted), had, 9, events)
    while len(had.endings) < outputs:
        received = had.received(outputs)
        await follow(await sessions.follow(had.stream_id, "", received), had, 9, events)
    assert had.content == expected.content


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("events", "ids"), [(1, False), (9, True), (20, False)])
async def test_another_replica_goes_on(cluster: Cluster, case: str, events: int, ids: bool) -> None:
    """Wherever the first one dies, and twice more."""
    wanted = request(**CASES[case])
    last = cluster()
    expected = await whole(last, wanted)
    had, outputs = Had(), max(1, wanted.output.n)
    first = cluster()
    await follow(await first.start(wanted), had, 9, events)
    first.kill()
    second = cluster()
    received = had.received(outputs, ids)
    await follow(await second.follow(had.stream_id, "", received), had, 9, events)
    second.kill()
    await follow(await last.follow(had.stream_id, "", had.received(outputs, ids)), had, 9)
    assert had.content == expected.content


async def test_a_stop_string_half_met_is_met_elsewhere(cluster: Cluster) -> None:
    plain = await whole(cluster(), request(60, sampling={"seed": 5}))
    text = plain.texts[0]
    stop = text[30:36]
    at = text.index(stop)
    wanted = request(60, sampling={"seed": 5})
    wanted.stopping.stop.append(stop)
    first, second, had = cluster(), cluster(), Had()
    with Gate(first.model) as gate:
        following = await first.start(wanted)
        gate.let(at + 5)  # the prompt is one pass or two
        await asyncio.sleep(0.2)
        await follow(following, had, 9, 2)
        gate.let(float("inf"))
        await until(lambda: following.session.ended)
        first.kill()
    await follow(await second.follow(had.stream_id, "", had.received(1)), had, 9)
    assert had.texts[0] == text[:at]
    assert had.endings[0].stop == stop


async def test_a_stream_that_ended_is_told_again(cluster: Cluster) -> None:
    first, second = cluster(), cluster()
    wanted = request()
    had = Had()
    following = await first.start(wanted)
    await follow(following, had, 9, 2)
    await until(lambda: following.session.ended)
    first.kill()
    for _ in range(2):
        again = replace(had, ids={0: list(had.ids.get(0, []))}, texts=dict(had.texts), endings={})
        await follow(await second.follow(had.stream_id, "", had.received(1)), again, 9)
        assert len(again.ids[0]) == 40
        assert again.endings[0].usage.generated_tokens == 40


async def test_a_key_that_was_used_attaches(cluster: Cluster) -> None:
    first, second = cluster(), cluster()
    wanted = request(idempotency_key="once")
    wanted.sampling.ClearField("seed")
    had, again, elsewhere = Had(), Had(), Had()
    await follow(await first.start(wanted), had, 9, 4)
    await follow(await first.start(wanted), again, 9)
    assert again.stream_id == had.stream_id
    assert again.ids[0][: len(had.ids[0])] == had.ids[0]
    first.kill()
    await follow(await second.start(wanted), elsewhere, 9)
    assert elsewhere.content == again.content
    other = await second.start(request(idempotency_key="other"))
    assert other.session.lease.stream_id != had.stream_id
    second_owner = await second.start(wanted, Caller("somebody else"))
    assert second_owner.session.lease.stream_id != had.stream_id
    for following in (other, second_owner):
        await second.model.forget(following.session)
    held = second.model.find(had.stream_id, "")
    assert held is not None
    readers = held.subscribers
    with pytest.raises(InvalidRequest, match="idempotency_key"):
        await second.start(request(39, idempotency_key="once"))
    assert held.subscribers == readers  # nobody was sent away for it


async def test_streams_are_handed_over(cluster: Cluster) -> None:
    wanted = request(80)
    last = cluster()
    expected = await whole(last, wanted)
    first, had = cluster(), Had()
    with Gate(first.model) as gate:
        following = await first.start(wanted)
        gate.let(30)
        await gate.held("step")
        handing = asyncio.create_task(hand_over([first.model], first.snapshots))
        reading = asyncio.create_task(follow(following, had, 9))
        await asyncio.sleep(0.05)
        gate.let(1)
        await asyncio.wait_for(asyncio.gather(handing, reading), LIMIT_S)
    assert had.handed_over
    assert not had.endings
    await until(lambda: is_empty(first.model))
    assert 0 < len(had.ids[0]) < 80
    with pytest.raises(EngineStopped):  # else it would go on where it was
        await first.follow(had.stream_id, "", had.received(1))
    await follow(await last.follow(had.stream_id, "", had.received(1)), had, 9)
    assert had.content == expected.content


async def test_only_the_owner_finds_a_stream(cluster: Cluster) -> None:
    sessions, had = cluster(), Had()
    await follow(await sessions.start(request(), Caller("me")), had, 9, 3)
    for owner in ("", "you"):
        with pytest.raises(UnknownSession):
            await sessions.follow(had.stream_id, owner, [])
        await sessions.delete(had.stream_id, owner)
    await follow(await sessions.follow(had.stream_id, "me", had.received(1)), had, 9)
    assert had.endings


async def test_who_comes_back_while_a_stream_is_deleted_does_not_revive_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, had, loop = cluster(), Had(), asyncio.get_running_loop()
    await follow(await sessions.start(request()), had, 9)
    snapshots, revived = sessions.snapshots, list[Any]()
    assert snapshots.flush(LIMIT_S)
    forget = snapshots.forget

    def slow_to_forget(owner: str, stream_id: str) -> None:
        """What somebody does between the model's forgetting and the store's."""
        back = reviver.at_rest(sessions.registry, stream_id, owner)
        revived.append(asyncio.run_coroutine_threadsafe(back, loop).result(LIMIT_S))
        forget(owner, stream_id)

    monkeypatch.setattr(snapshots, "forget", slow_to_forget)
    await sessions.delete(had.stream_id, "")
    assert revived
    assert is_empty(sessions.model)
    with pytest.raises(UnknownSession):
        await sessions.follow(had.stream_id, "", [])


@pytest.mark.parametrize("stream_id", ["", "no-such-stream", "../../etc", "a/b", "\0"])
async def test_what_is_not_there_is_unknown(cluster: Cluster, stream_id: str) -> None:
    sessions = cluster()
    with pytest.raises(UnknownSession):
        await sessions.follow(stream_id, "", [])
    await sessions.delete(stream_id, "")


async def test_a_stream_is_forgotten_when_it_was_kept_long_enough(cluster: Cluster) -> None:
    sessions, had = cluster(stream_buffer=4), Had()
    wanted = request(80, keep={"nanos": 200_000_000})
    await follow(await sessions.start(wanted), had, 9, 3)
    assert sessions.model.find(had.stream_id, "") is not None
    await until(lambda: is_empty(sessions.model), 10)


async def test_without_keep_a_stream_ends_with_its_reader(cluster: Cluster) -> None:
    sessions, had = cluster(), Had()
    wanted = request(80)
    wanted.ClearField("keep")
    await follow(await sessions.start(wanted), had, 9, 3)
    await until(lambda: is_empty(sessions.model), 10)
    with pytest.raises(UnknownSession):
        await sessions.follow(had.stream_id, "", [])


async def test_a_second_reader_sends_the_first_away(cluster: Cluster) -> None:
    sessions = cluster()
    with Gate(sessions.model) as gate:
        following = await sessions.start(request())
        gate.let(12)
        await gate.held("step")
        events = send(following, 0, durable=False)
        stream_id = (await anext(events)).accepted.stream_id
        attaching = asyncio.create_task(sessions.follow(stream_id, "", [BEGINNING]))
        await asyncio.sleep(0.05)
        gate.let(float("inf"))
        second = await asyncio.wait_for(attaching, LIMIT_S)
        rest = [event async for event in events]
        assert rest[-1].error.code == "ABORTED"
        had = Had(stream_id, 1)
        await follow(second, had, 9)
        assert len(had.ids[0]) == 40
        await sessions.delete(stream_id, "")


async def test_a_snapshot_of_another_bundle_is_refused(cluster: Cluster, text: Bundle) -> None:
    first, had = cluster(), Had()
    await follow(await first.start(request()), had, 9, 12)
    first.kill()
    second = cluster()
    model = second.model
    manifest = type(text.manifest)()
    manifest.CopyFrom(text.manifest)
    manifest.fingerprint = "0" * 64
    model.bundle = replace(text, manifest=manifest)
    with pytest.raises(SnapshotRefused, match="another bundle"):
        await second.follow(had.stream_id, "", had.received(1))
    model.bundle = text
    elsewhere = SessionRegistry({"other": model}, second.snapshots)
    with pytest.raises(UnknownModel):
        await reviver.follow(elsewhere, had.stream_id, "", had.received(1))


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"after_sequence": 2**64 - 1}, "after_sequence"),
        ({"cursors": [{"tokens": 2**64 - 1}]}, "cursors.tokens"),
        ({"cursors": [{"characters": 2**64 - 1}]}, "cursors.characters"),
    ],
)
def test_what_cannot_have_been_received_is_refused(told: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        resume_request(pb.ResumeRequest(stream_id="a", **told))


async def test_a_token_that_is_none_is_not_pushed(cluster: Cluster) -> None:
    """It would have failed the step of everybody in the batch."""
    first, second, had = cluster(snapshot_interval=1_000), cluster(), Had()
    await follow(await first.start(request()), had, 9, 5)
    first.die()
    first.kill()
    received = [ResumeCursor(3, 3, last_ids=(1, 256, 3))]
    with pytest.raises(InvalidRequest, match=r"last_ids has 256; .* below 256"):
        await second.follow(had.stream_id, "", received)


async def test_what_a_reader_knew_is_told_to_the_next(cluster: Cluster) -> None:
    """One said that the output was over, whose end was not stored yet; another knows nothing."""
    wanted = request(40)
    last = cluster()
    expected = await whole(last, wanted)
    first, had = cluster(snapshot_interval=1_000), Had()
    with Gate(first.model) as gate:
        following = await first.start(wanted)
        gate.let(20)
        await gate.held("step")
        first.die()
        gate.let(float("inf"))
        await follow(following, had, 9)
    first.kill()
    await follow(await last.follow(had.stream_id, "", had.received(1)), had, 9)
    again = Had(had.stream_id, 1)
    await follow(await last.follow(had.stream_id, "", [BEGINNING]), again, 9)
    assert again.content == expected.content

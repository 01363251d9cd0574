"""When a stream cannot be moved or copied: it ends or goes on, and no other one notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from server.bundles.bundle import Bundle
from server.checkpoint import Checkpoint, Finish, FinishReason
from server.config import EngineConfig
from server.engine.sampling.logits_processors import PenaltyState
from server.engine.stream import Stream
from server.engine.updates import HandedOver
from server.errors import StepFailed
from server.request import Lease, LogitsProcessors, Request, SamplingParameters
from tests.server.engines import (
    DrivenModel,
    Gate,
    ask,
    generate,
    is_empty,
    read,
    together,
    until,
)

Start = Callable[..., DrivenModel]


class _Offers:
    """A snapshot store that keeps all that it is offered."""

    is_durable = True

    def __init__(self) -> None:
        self.taken: list[tuple[Lease, Checkpoint]] = []

    def offer(self, bundle: Bundle, lease: Lease, output: int, checkpoint: Checkpoint) -> None:
        self.taken.append((lease, checkpoint))

    def of(self, stream: Stream) -> list[Checkpoint]:
        return [checkpoint for lease, checkpoint in self.taken if lease is stream.lease]


class _Plant:
    """A method of `runtime` that raises once: the first time it is called inside of `place`."""

    def __init__(self, model: DrivenModel, place: str, method: str, runtime: Any = None) -> None:
        self.fired = False
        self._inside = False
        part, _, name = place.partition(".")
        owner: Any = getattr(model.engine, part)
        runtime = runtime or model.engine.runtime
        move, run = getattr(owner, name), getattr(runtime, method)

        def watched(*args: Any, **named: Any) -> Any:
            self._inside = True
            try:
                return move(*args, **named)
            finally:
                self._inside = False

        def fail(*args: Any, **named: Any) -> Any:
            if self._inside and not self.fired:
                self.fired = True
                raise MemoryError("a secret of /the/server")
            return run(*args, **named)

        setattr(owner, name, watched)
        setattr(runtime, method, fail)


@asynccontextmanager
async def _serving(bundle: Bundle, **settings: Any) -> AsyncIterator[tuple[DrivenModel, _Offers]]:
    offers = _Offers()
    settings = {"threads": 1, "prefix_cache_bytes": 0, "snapshot_interval": 16, **settings}
    model = DrivenModel(bundle, EngineConfig(**settings), offers)
    try:
        yield model, offers
        for session in model.table.all():  # those that are kept
            await model.forget(session)
        await until(lambda: is_empty(model), limit_s=10)
        assert model.alive
    finally:
        model.close()


def _keep(model: DrivenModel, request: Request, checkpoint: Checkpoint | None = None) -> Stream:
    checkpoints = [] if checkpoint is None else [checkpoint]
    return model.open(Lease("kept", (request,), keep_s=60.0), checkpoints).streams[0]


_PLANTS = {  # place and method: most streams that may end with an error
    ("placement.begin", "reset"): 1,
    ("placement.begin", "write"): 1,
    ("placement.start_prefill", "reset"): 1,
    ("placement.start_prefill", "write"): 1,
    ("placement.join", "move"): 1,
    ("placement.join", "read"): 0,  # the siblings prefill themselves
    ("placement.preempt", "read"): 1,
    ("placement.preempt", "move"): 1,
    ("placement.pause", "read"): 1,
    ("placement.pause", "move"): 1,
    ("placement.restore", "write"): 1,
    ("placement.remove", "move"): 1,
    ("streams.snapshot_if_due", "read"): 0,
    ("streams.snapshot_if_due", "offer"): 0,
    ("decoding.decode", "read"): 0,  # its state is not saved, and it ends as it should
}


@pytest.mark.parametrize(("place", "method"), _PLANTS)
async def test_a_copy_that_fails_harms_one_stream_at_most(
    text: Bundle, place: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams that wait, prefill, share a prompt, lag, are parked and kept, all at once."""
    first = ask(bytes(range(65, 96)), 12)
    siblings = [replace(first, sampling=SamplingParameters(seed=5, output=n)) for n in range(3)]
    low = [ask(max_tokens=40, priority=-1), ask(max_tokens=40, seed=2), ask(b"xxx", 40, seed=3)]
    high, kept = ask(max_tokens=20, seed=9, priority=1), ask(b"kept " * 8, max_tokens=30)
    wanted = [*siblings, *low, high, kept]
    async with _serving(text, slots=3) as (calm, seen):
        expected = [(await generate(calm, request)).tokens for request in wanted]
        stream = _keep(calm, kept)
        await read(calm, stream)
        early = next(c for c in seen.of(stream) if c.saved and c.saved.pushed < len(kept.prompt))
    async with _serving(text, slots=3, stream_buffer=8) as (model, offers):
        plant = _Plant(model, place, method, offers if method == "offer" else None)
        with Gate(model) as gate:
            lagging = [model.submit(low[0])]
            await until(lambda: gate.standing or plant.fired)
            lagging += [model.submit(request) for request in low[1:]]
            gate.let(3)  # a step, the other prompt, a step of all three if none failed
            await until(lambda: gate.passes == 3 and gate.standing)
            with together(model):
                urgent, resumed = model.submit(high), _keep(model, kept, early)
                outputs = model.submit_together(siblings)
        await until(lambda: model.engine.placement.paused)
        streams = [*outputs, *lagging, urgent, resumed]
        outcomes = await asyncio.gather(*(read(model, s) for s in streams))
        assert plant.fired
        again = [(await generate(model, request)).tokens for request in wanted]
    assert again == expected
    failed = [outcome for outcome in outcomes if isinstance(outcome.ending, StepFailed)]
    assert len(failed) <= _PLANTS[place, method]
    for outcome, tokens in zip(outcomes, expected, strict=True):
        if outcome in failed:
            assert "secret" not in outcome.ending.message  # type: ignore[union-attr]
            assert outcome.tokens == tokens[: len(outcome.tokens)]
        else:
            assert isinstance(outcome.ending, Finish)
            assert outcome.tokens == tokens
    assert "a secret of /the/server" in caplog.text


@pytest.mark.parametrize("reason", ["paused", "time limit", "handed over"])
@pytest.mark.parametrize("draft_tokens", [0, 4])
async def test_a_stream_whose_state_cannot_be_copied_ends_with_its_tokens(
    text: Bundle, reason: str, draft_tokens: int
) -> None:
    """It goes on from its tokens, and the state is made again from them."""
    wanted = ask(b"prompt", 40)
    async with _serving(text, draft_tokens=draft_tokens) as (model, offers):
        expected = (await generate(model, wanted)).tokens
        place = "streams.hand_over" if reason == "handed over" else "streams.stop"
        plant = _Plant(model, place, "read")
        with Gate(model) as gate:
            limit_s = 0.05 if reason == "time limit" else None
            stream = _keep(model, replace(wanted, time_limit_s=limit_s))
            await gate.held("prefill")
            gate.let(9)
            await until(lambda: gate.passes == 9 and gate.standing)
            if reason == "paused":
                model.engine.post(lambda: model.engine.streams.stop(stream, FinishReason.PAUSED))
            elif reason == "handed over":
                model.engine.post(lambda: model.engine.streams.hand_over(stream, HandedOver()))
            await asyncio.sleep(0.1)
        outcome = await read(model, stream)
        assert plant.fired and stream.saved is None
        kind = HandedOver if reason == "handed over" else Finish
        assert isinstance(outcome.ending, kind)
        assert 0 < len(outcome.tokens) < 40 and outcome.tokens == expected[: len(outcome.tokens)]
        stored = offers.of(stream)[-1]
        assert stored.saved is None and tuple(stored.generated) == outcome.tokens
        session = model.find(stream.id, "")
        assert session is not None
        await model.forget(session)
        resumed = _keep(model, wanted, replace(stored, finish=None))
        assert (await read(model, resumed)).tokens == expected


async def test_a_stream_that_cannot_start_ends_alone(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("a secret of /the/server")

    model = start(text, slots=2)
    processors = LogitsProcessors(repetition_penalty=1.5)
    penalised = SamplingParameters(seed=1, processors=processors)
    plain = ask(max_tokens=20)
    expected = (await generate(model, plain)).tokens
    monkeypatch.setattr(PenaltyState, "of", fail)
    with together(model):
        streams = [
            model.submit(plain),
            model.submit(ask(sampling=penalised)),
            model.submit(ask(b"abc", sampling=penalised)),
            model.submit(plain),
        ]
    outcomes = [await read(model, stream) for stream in streams]
    assert [outcome.tokens for outcome in outcomes] == [expected, (), (), expected]
    assert all(isinstance(outcome.ending, StepFailed) for outcome in outcomes[1:3])


async def test_rows_that_never_move_cost_only_the_streams_that_would_have_moved(
    text: Bundle, start: Start
) -> None:
    """However often it fails, the loop does not turn for ever."""
    model = start(text, slots=4)
    expected = (await generate(model, ask(max_tokens=30))).tokens

    def fail(*args: object) -> None:
        raise MemoryError

    model.engine.runtime.move = fail  # type: ignore[method-assign]
    with together(model):
        first = model.submit(ask(max_tokens=3))
        others = [model.submit(ask(max_tokens=30)) for _ in range(6)]
    outcomes = [await read(model, stream) for stream in (first, *others)]
    assert outcomes[0].tokens == expected[:3]
    unplaced = [isinstance(outcome.ending, StepFailed) for outcome in outcomes]
    assert unplaced == [False, True, True, True, False, False, False]
    assert [outcome.tokens for outcome in outcomes[4:]] == [expected] * 3


async def test_an_action_that_raises_harms_nobody(
    text: Bundle, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    model = start(text, slots=1)
    expected = (await generate(model, ask(max_tokens=20))).tokens

    def fail() -> None:
        raise MemoryError("a secret of /the/server")

    with together(model):
        before = model.submit(ask(max_tokens=20))
        model.engine.post(fail)
        after = model.submit(ask(max_tokens=20))
    assert (await read(model, before)).tokens == (await read(model, after)).tokens == expected
    assert caplog.messages == ["an action in the inbox of tiny-text failed"]


async def test_an_opening_that_raises_ends_its_streams(text: Bundle, start: Start) -> None:
    model, enqueued = start(text, slots=1), 0
    expected = (await generate(model, ask(max_tokens=20))).tokens
    enqueue = model.engine.streams.enqueue

    def fail(stream: Stream) -> None:
        nonlocal enqueued
        enqueued += 1
        if enqueued == 3:
            raise MemoryError("a secret of /the/server")
        enqueue(stream)

    model.engine.streams.enqueue = fail  # type: ignore[method-assign]
    with together(model):
        before = model.submit(ask(max_tokens=20))
        broken = model.submit_together([ask(max_tokens=20)] * 3)
        after = model.submit(ask(max_tokens=20))
    for stream in broken:
        ending = (await read(model, stream)).ending
        assert isinstance(ending, StepFailed)
        assert ending.message == "the stream could not be opened; see the server's log"
    assert (await read(model, before)).tokens == (await read(model, after)).tokens == expected
    for stream in broken:
        model.cancel(stream)
    assert (await generate(model, ask(max_tokens=20))).tokens == expected


async def test_a_stream_that_cannot_be_registered_takes_no_room(text: Bundle, start: Start) -> None:
    model = start(text)

    def fail(*args: object) -> None:
        raise MemoryError

    model.table.add = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(MemoryError):
        model.submit(ask())
    assert model.engine.is_empty

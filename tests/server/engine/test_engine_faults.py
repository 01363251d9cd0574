"""When the model fails, and when the engine stops: everybody is told, and nobody else suffers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from itertools import count

import grpc
import numpy as np
import pytest

from server.bundles.bundle import Bundle
from server.engine import loop as loop_module
from server.engine.engine import Engine
from server.engine.events import Scored
from server.errors import EngineStopped, StepFailed
from server.runtime.onnx_session import Floats, Ints
from server.sessions.subscriber import NOTHING
from tests.server.engines import (
    LIMIT_S,
    Gate,
    Outcome,
    ask,
    change_logits,
    generate,
    is_empty,
    read,
    together,
    until,
)

Start = Callable[..., Engine]


def _failure(outcome: Outcome) -> StepFailed:
    assert isinstance(outcome.ending, StepFailed), outcome.ending
    assert outcome.ending.code == grpc.StatusCode.INTERNAL
    return outcome.ending


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_a_value_that_is_not_finite_ends_that_stream_alone(
    text: Bundle, start: Start, value: float
) -> None:
    engine = start(text, slots=4)
    wanted = [ask(b"x" * n, max_tokens=20, seed=n) for n in (0, 3, 9)]
    expected = [(await generate(engine, w)).tokens for w in wanted]

    def spoil(logits: Floats, positions: Ints) -> Floats:
        logits = logits.copy()
        logits[positions == 45, 7] = value
        return logits

    change_logits(engine, spoil)
    spoilt = ask(b"y" * 40, max_tokens=20)
    *fine, broken = await asyncio.gather(*[generate(engine, w) for w in (*wanted, spoilt)])
    assert [outcome.tokens for outcome in fine] == expected
    assert len(broken.tokens) == 5
    assert "not a number at position 45" in _failure(broken).message
    assert [(await generate(engine, w)).tokens for w in wanted] == expected


async def test_a_state_that_is_not_finite_stays_with_its_stream(text: Bundle, start: Start) -> None:
    """Rows and the bench are used again; what lay there must not shine through."""
    engine = start(text, slots=3)
    wanted = ask(b"prompt", max_tokens=60)
    expected = (await generate(engine, wanted)).tokens
    with Gate(engine) as gate:
        with together(engine):
            poisoned = [engine.submit(ask(max_tokens=60)) for _ in range(2)]
            poisoned.append(engine.submit(ask(b"x" * 60, max_tokens=8)))
        await gate.held("step")
        await gate.let_one("prefill")
        await gate.let_one("step")
        for buffer in engine._loop.runtime._rows.buffers.values():
            buffer[:] = np.nan
    for stream in poisoned:
        _failure(await read(engine, stream))
    assert [(await generate(engine, wanted)).tokens for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("block", [0, 2])
async def test_a_score_that_is_not_finite_is_an_error(
    text: Bundle, start: Start, block: int
) -> None:
    engine = start(text)
    prefill = engine._loop.runtime.prefill

    def spoil(row: int, tokens: Ints, position: int, length: int, logits: bool = False) -> Floats:
        out = prefill(row, tokens, position, length, logits).copy()
        if position == block * 8 and logits:
            out[3] = np.nan
        return out

    engine._loop.runtime.prefill = spoil  # type: ignore[method-assign]
    outcome = await generate(engine, ask(b"x" * 30, score=True))
    assert f"position {block * 8 + 3}" in _failure(outcome).message
    engine._loop.runtime.prefill = prefill  # type: ignore[method-assign]
    assert isinstance((await generate(engine, ask(b"x" * 3, score=True))).ending, Scored)


def _fail_once(engine: Engine, name: str, after: int) -> None:
    """Makes one call of the runtime raise what onnxruntime could."""
    run, calls = getattr(engine._loop.runtime, name), count()

    def fail(*args: object) -> object:
        if next(calls) == after:
            raise RuntimeError("a secret of /the/server")
        return run(*args)

    setattr(engine._loop.runtime, name, fail)


@pytest.mark.parametrize(
    ("name", "after"), [("step", 0), ("step", 10), ("prefill", 2), ("fold", 3), ("move", 1)]
)
async def test_a_pass_that_raises_ends_its_streams_and_the_engine_goes_on(
    text: Bundle, start: Start, name: str, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(text, slots=2)
    wanted = ask(b"some prompt", max_tokens=20)
    expected = (await generate(engine, wanted)).tokens
    _fail_once(engine, name, after)
    outcomes = await asyncio.gather(*[generate(engine, wanted) for _ in range(8)])
    failed = [outcome for outcome in outcomes if isinstance(outcome.ending, StepFailed)]
    assert 1 <= len(failed) <= 3  # both slots and the bench
    for outcome in failed:
        assert "secret" not in _failure(outcome).message
        assert outcome.tokens == expected[: len(outcome.tokens)]
    served = [outcome.tokens for outcome in outcomes if outcome not in failed]
    assert served == [expected] * (8 - len(failed))
    assert caplog.messages == ["a pass of tiny-text failed"]
    assert engine.alive


# ---- the end of an engine


async def test_closing_ends_every_stream_wherever_it_is(text: Bundle, start: Start) -> None:
    engine = start(text, slots=1, stream_buffer=4)
    paused = engine.submit(ask(max_tokens=60))
    await until(lambda: paused.paused)
    with Gate(engine) as gate:
        with together(engine):
            running = engine.submit(ask(max_tokens=3))
            scored = engine.submit(ask(b"x" * 60, score=True))
            waiting = engine.submit(ask(max_tokens=60, time_limit_s=100.0))
        await gate.held("step")
        gate.let(1)
        await gate.held("prefill")
        await gate.let_one("step")
        assert (engine._loop.places.running, engine._loop.places.paused) == ([running], [paused])
        assert (engine._loop.places.bench, list(engine._loop.places.waiting)) == (scored, [waiting])
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await until(lambda: engine._loop._closing)
    await asyncio.wait_for(closing, LIMIT_S)
    for stream in (paused, running, scored, waiting):
        ending = (await read(engine, stream)).ending
        assert isinstance(ending, EngineStopped)
        assert (ending.code, ending.retryable) == (grpc.StatusCode.UNAVAILABLE, True)
    assert is_empty(engine)
    assert not engine.alive


async def test_a_closed_engine_refuses(text: Bundle, start: Start) -> None:
    engine = start(text)
    outcome = await generate(engine, ask())
    engine.close()
    engine.close()
    with pytest.raises(EngineStopped, match="shutting down"):
        engine.submit(ask())
    assert engine._loop.ledger.held.streams == 0
    assert len(outcome.tokens) == 8


async def test_a_stream_submitted_while_the_engine_closes_is_not_forgotten(
    text: Bundle, start: Start
) -> None:
    """It was not refused, so it has to end, though the engine is told to stop before it is told."""
    engine = start(text)
    closing = threading.Thread(target=engine.close)
    post = engine._loop.post

    def late(action: Callable[[], None]) -> None:
        closing.start()
        closing.join(0.2)
        post(action)

    engine._loop.post = late  # type: ignore[method-assign]
    stream = engine.submit(ask(max_tokens=90))
    assert isinstance((await read(engine, stream)).ending, EngineStopped)
    closing.join(LIMIT_S)


async def test_who_gives_up_before_it_is_done_is_not_answered(text: Bundle, start: Start) -> None:
    engine = start(text, slots=1)
    with Gate(engine) as gate:
        stream = engine.submit(ask())
        await gate.held("step")
        session = engine.find(stream.id, "")
        assert session is not None
        asking = asyncio.create_task(engine.attach(session, [NOTHING]))
        await until(lambda: engine._loop._inbox)
        asking.cancel()
        await asyncio.wait([asking])
    assert len((await read(engine, stream)).tokens) == 8  # its first reader was not sent away
    assert engine.alive and asking.cancelled()


async def test_a_session_is_forgotten_though_nobody_waits_for_it(
    text: Bundle, start: Start
) -> None:
    engine = start(text, slots=1, stream_buffer=4)
    with Gate(engine) as gate:
        stream = engine.submit(ask(max_tokens=90))
        await gate.held("step")
        session = engine.find(stream.id, "")
        assert session is not None
        asking = asyncio.create_task(engine.forget(session))
        await until(lambda: engine._loop._inbox)
        asking.cancel()
        await asyncio.wait([asking])
    await until(lambda: is_empty(engine))
    assert engine.alive and asking.cancelled() and not engine.holds_sessions


async def test_who_gives_up_when_it_is_done_leaves_nothing(text: Bundle, start: Start) -> None:
    engine = start(text, stream_buffer=4)
    stream = engine.submit(ask(max_tokens=90))
    await until(lambda: engine._loop.places.paused)
    session = engine.find(stream.id, "")
    assert session is not None
    first = session.readers
    asking = asyncio.create_task(engine.attach(session, [NOTHING]))
    await asyncio.sleep(0)
    while session.readers == first:  # and this event loop hears nothing of it
        time.sleep(0.01)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await until(lambda: is_empty(engine))


async def test_closing_is_noticed_at_any_moment(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even between two looks at what there is to do, of which the second is a long wait."""
    monkeypatch.setattr(loop_module, "_IDLE_WAIT_S", 10 * LIMIT_S)
    engine = start(text)
    await generate(engine, ask())
    clear = engine._loop._wake.clear

    def close_before_clearing() -> None:
        engine._loop._closing = True
        engine._loop._wake.set()
        clear()

    engine._loop._wake.clear = close_before_clearing  # type: ignore[method-assign]
    engine._loop._wake.set()
    await until(lambda: not engine.alive)


async def test_an_engine_that_dies_tells_everybody(
    text: Bundle, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody may wait for ever for a thread that is gone."""
    engine = start(text, slots=1)

    def die(idle: bool) -> None:
        raise MemoryError("a secret of /the/server")

    with Gate(engine) as gate:
        streams = [engine.submit(ask(max_tokens=90)) for _ in range(3)]
        await gate.held("step")
        engine._loop._measure = die  # type: ignore[method-assign]
    for stream in streams:
        ending = (await read(engine, stream)).ending
        assert isinstance(ending, EngineStopped)
        assert "secret" not in ending.message
    await until(lambda: not engine.alive)
    assert "a secret of /the/server" in caplog.text
    with pytest.raises(EngineStopped):
        engine.submit(ask())
    assert is_empty(engine)

"""When the model fails or the engine stops, the right streams end with an error."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from itertools import count

import numpy as np
import pytest

from server.arrays import Floats, Ints
from server.bundles.bundle import Bundle
from server.engine.engine import Engine
from server.engine.restore import BEGINNING
from server.engine.updates import Scored
from server.errors import EngineStopped, StepFailed
from tests.server.engines import (
    LIMIT_S,
    DrivenModel,
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

Start = Callable[..., DrivenModel]
_PASS_FAILED = "a pass of tiny-text failed"


def _failure(outcome: Outcome) -> StepFailed:
    assert isinstance(outcome.ending, StepFailed), outcome.ending
    assert outcome.ending.status == "INTERNAL"
    return outcome.ending


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_a_value_that_is_not_finite_ends_only_its_stream(
    text: Bundle, start: Start, value: float
) -> None:
    model = start(text, slots=4)
    wanted = [ask(b"x" * n, max_tokens=20, seed=n) for n in (0, 3, 9)]
    expected = [(await generate(model, w)).tokens for w in wanted]

    def spoil(logits: Floats, positions: Ints) -> Floats:
        logits = logits.copy()
        logits[positions == 45, 7] = value
        return logits

    change_logits(model, spoil)
    spoilt = ask(b"y" * 40, max_tokens=20)
    *fine, broken = await asyncio.gather(*[generate(model, w) for w in (*wanted, spoilt)])
    assert [outcome.tokens for outcome in fine] == expected
    assert len(broken.tokens) == 5
    assert "not a number at position 45" in _failure(broken).message
    assert [(await generate(model, w)).tokens for w in wanted] == expected


async def test_a_state_that_is_not_finite_stays_with_its_stream(text: Bundle, start: Start) -> None:
    """Rows and the prefill slot are used again: former values there must have no effect."""
    model = start(text, slots=3)
    wanted = ask(b"prompt", max_tokens=60)
    expected = (await generate(model, wanted)).tokens
    with Gate(model) as gate:
        with together(model):
            poisoned = [model.submit(ask(max_tokens=60)) for _ in range(2)]
            poisoned.append(model.submit(ask(b"x" * 60, max_tokens=8)))
        await gate.held("step")
        await gate.let_one("prefill")
        await gate.let_one("step")
        for buffer in model.engine.runtime.rows.buffers.values():
            buffer[:] = np.nan
    for stream in poisoned:
        _failure(await read(model, stream))
    assert [(await generate(model, wanted)).tokens for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("block", [0, 2])
async def test_a_score_that_is_not_finite_is_an_error(
    text: Bundle, start: Start, block: int
) -> None:
    model = start(text)
    prefill = model.engine.runtime.prefill

    def spoil(row: int, tokens: Ints, position: int, length: int, logits: bool = False) -> Floats:
        out = prefill(row, tokens, position, length, logits).copy()
        if position == block * 8 and logits:
            out[3] = np.nan
        return out

    model.engine.runtime.prefill = spoil  # type: ignore[method-assign]
    outcome = await generate(model, ask(b"x" * 30, score=True))
    assert f"position {block * 8 + 3}" in _failure(outcome).message
    model.engine.runtime.prefill = prefill  # type: ignore[method-assign]
    assert isinstance((await generate(model, ask(b"x" * 3, score=True))).ending, Scored)


def _fail_once(model: DrivenModel, name: str, after: int) -> None:
    """Makes one call of the runtime raise an error of onnxruntime."""
    run, calls = getattr(model.engine.runtime, name), count()

    def fail(*args: object) -> object:
        if next(calls) == after:
            raise RuntimeError("a secret of /the/server")
        return run(*args)

    setattr(model.engine.runtime, name, fail)


@pytest.mark.parametrize(
    ("name", "after"), [("step", 0), ("step", 10), ("prefill", 2), ("fold", 3), ("move", 1)]
)
async def test_a_pass_that_raises_ends_its_streams_and_the_engine_continues(
    text: Bundle, start: Start, name: str, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = start(text, slots=2)
    wanted = ask(b"some prompt", max_tokens=20)
    expected = (await generate(model, wanted)).tokens
    _fail_once(model, name, after)
    outcomes = await asyncio.gather(*[generate(model, wanted) for _ in range(8)])
    failed = [outcome for outcome in outcomes if isinstance(outcome.ending, StepFailed)]
    own = name in ("move", "prefill")  # work for one stream alone
    assert 1 <= len(failed) <= (1 if own else 3)  # both slots and the prefill slot
    for outcome in failed:
        assert "secret" not in _failure(outcome).message
        assert outcome.tokens == expected[: len(outcome.tokens)]
    served = [outcome.tokens for outcome in outcomes if outcome not in failed]
    assert served == [expected] * (8 - len(failed))
    what = "a stream of tiny-text could not be placed" if name == "move" else _PASS_FAILED
    assert caplog.messages == [what]
    assert model.alive


# ---- the end of an engine


async def test_closing_ends_every_stream_in_every_place(text: Bundle, start: Start) -> None:
    model = start(text, slots=1, stream_buffer=4)
    paused = model.submit(ask(max_tokens=60))
    await until(lambda: paused.paused)
    with Gate(model) as gate:
        with together(model):
            running = model.submit(ask(max_tokens=3))
            scored = model.submit(ask(b"x" * 60, score=True))
            waiting = model.submit(ask(max_tokens=60, time_limit_s=100.0))
        await gate.held("step")
        gate.let(1)
        await gate.held("prefill")
        await gate.let_one("step")
        assert (model.engine.placement.running, model.engine.placement.paused) == (
            [running],
            [paused],
        )
        assert (model.engine.placement.prefilling, list(model.engine.placement.waiting)) == (
            scored,
            [waiting],
        )
        closing = asyncio.create_task(asyncio.to_thread(model.close))
        await until(lambda: model.engine.closing)
    await asyncio.wait_for(closing, LIMIT_S)
    for stream in (paused, running, scored, waiting):
        ending = (await read(model, stream)).ending
        assert isinstance(ending, EngineStopped)
        assert (ending.status, ending.retryable) == ("UNAVAILABLE", True)
    assert is_empty(model)
    assert not model.alive


async def test_a_closed_engine_refuses(text: Bundle, start: Start) -> None:
    model = start(text)
    outcome = await generate(model, ask())
    model.close()
    model.close()
    with pytest.raises(EngineStopped, match="shutting down"):
        model.submit(ask())
    assert model.engine.ledger.held.streams == 0
    assert len(outcome.tokens) == 8


async def test_a_stream_submitted_while_the_engine_closes_ends(text: Bundle, start: Start) -> None:
    """It was admitted, so it must end, although the engine stops before it takes it."""
    model = start(text)
    closing = threading.Thread(target=model.close)
    post = model.engine.post

    def late(action: Callable[[], None]) -> None:
        closing.start()
        closing.join(0.2)
        post(action)

    model.engine.post = late  # type: ignore[method-assign]
    stream = model.submit(ask(max_tokens=90))
    assert isinstance((await read(model, stream)).ending, EngineStopped)
    closing.join(LIMIT_S)


async def test_a_cancelled_attachment_is_not_made(text: Bundle, start: Start) -> None:
    model = start(text, slots=1)
    with Gate(model) as gate:
        stream = model.submit(ask())
        await gate.held("step")
        session = model.find(stream.id, "")
        assert session is not None
        asking = asyncio.create_task(model.attach(session, [BEGINNING]))
        await until(lambda: model.engine.num_actions)
        asking.cancel()
        await asyncio.wait([asking])
    assert len((await read(model, stream)).tokens) == 8  # its first subscriber is still attached
    assert model.alive and asking.cancelled()


async def test_a_session_is_deleted_even_if_its_caller_is_cancelled(
    text: Bundle, start: Start
) -> None:
    model = start(text, slots=1, stream_buffer=4)
    with Gate(model) as gate:
        stream = model.submit(ask(max_tokens=90))
        await gate.held("step")
        session = model.find(stream.id, "")
        assert session is not None
        asking = asyncio.create_task(model.forget(session))
        await until(lambda: model.engine.num_actions)
        asking.cancel()
        await asyncio.wait([asking])
    await until(lambda: is_empty(model))
    assert model.alive and asking.cancelled() and not model.holds_sessions


async def test_an_attachment_cancelled_too_late_leaves_nothing(text: Bundle, start: Start) -> None:
    model = start(text, stream_buffer=4)
    stream = model.submit(ask(max_tokens=90))
    await until(lambda: model.engine.placement.paused)
    session = model.find(stream.id, "")
    assert session is not None
    first = session.subscribers
    asking = asyncio.create_task(model.attach(session, [BEGINNING]))
    await asyncio.sleep(0)
    while session.subscribers == first:  # this event loop does not run meanwhile
        time.sleep(0.01)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await until(lambda: is_empty(model))


async def test_closing_takes_effect_at_any_moment(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even between the last turn and a long wait."""
    monkeypatch.setattr(Engine, "idle_wait_s", 10 * LIMIT_S)
    model = start(text)
    await generate(model, ask())
    clear = model.engine.wakeup.clear

    def close_before_clearing() -> None:
        threading.Thread(target=model.close).start()  # it joins the thread that runs this
        while not model.engine.closing:
            time.sleep(0.001)
        model.engine.wakeup.wait(LIMIT_S)
        clear()

    model.engine.wakeup.clear = close_before_clearing  # type: ignore[method-assign]
    model.engine.wakeup.set()
    await until(lambda: not model.alive)


async def test_a_dead_engine_ends_all_streams(
    text: Bundle, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """No reader waits for ever for a dead thread."""
    model = start(text, slots=1)

    def die(now: float) -> None:
        raise MemoryError("a secret of /the/server")

    with Gate(model) as gate:
        streams = [model.submit(ask(max_tokens=90)) for _ in range(3)]
        await gate.held("step")
        model.engine.metrics.are_due = die  # type: ignore[method-assign]
    for stream in streams:
        ending = (await read(model, stream)).ending
        assert isinstance(ending, EngineStopped)
        assert "secret" not in ending.message
    await until(lambda: not model.alive)
    assert "a secret of /the/server" in caplog.text
    with pytest.raises(EngineStopped):
        model.submit(ask())
    assert is_empty(model)


async def test_an_action_that_raises_ends_no_stream(text: Bundle, start: Start) -> None:
    model = start(text, slots=4)
    expected = (await generate(model, ask(max_tokens=40))).tokens
    running = asyncio.create_task(generate(model, ask(max_tokens=40)))
    await until(lambda: bool(model.engine.placement.running))

    def fail() -> None:
        raise ValueError("an action")

    model.engine.post(fail)
    assert (await running).tokens == expected
    assert model.engine.alive

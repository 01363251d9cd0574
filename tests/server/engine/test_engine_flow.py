"""How an engine treats waiting, cancelled, slow and late streams."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest

from server.arrays import Floats, Ints
from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason
from server.engine import decoding, engine, lifecycle, loop, stream
from server.engine.engine import Engine
from server.engine.stream import Stream
from server.errors import Overloaded
from server.sessions.subscriber import Delta
from tests.server.engines import (
    LIMIT_S,
    DrivenModel,
    Gate,
    Outcome,
    ask,
    generate,
    is_empty,
    read,
    script,
    together,
    until,
)

Start = Callable[..., DrivenModel]


# ---- cancelling


async def test_cancelling_a_running_stream_frees_its_slot_before_the_next_step(
    text: Bundle, start: Start
) -> None:
    model = start(text, slots=1)
    with Gate(model) as gate:
        gone, next_one = model.submit(ask(max_tokens=90)), model.submit(ask(max_tokens=2))
        await gate.held("step")
        await gate.let_one("step")
        assert model.engine.placement.running == [gone]
        model.cancel(gone)
        await gate.let_one("step")
        assert model.engine.placement.running == [next_one]
        assert gone.generated == 2  # the step in flight, and no more
        assert model.engine.ledger.held.streams == 1
    assert len((await read(model, next_one)).tokens) == 2


async def test_cancelling_a_waiting_stream_takes_it_out_of_the_queue(
    text: Bundle, start: Start
) -> None:
    model = start(text, slots=1)
    with Gate(model) as gate:
        running, gone, last = (model.submit(ask(max_tokens=3)) for _ in range(3))
        await gate.held("step")
        await gate.let_one("step")
        assert list(model.engine.placement.waiting) == [gone, last]
        model.cancel(gone)
        await gate.let_one("step")
        assert list(model.engine.placement.waiting) == [last]
        assert model.engine.ledger.held.streams == 2
    assert [len((await read(model, s)).tokens) for s in (running, last)] == [3, 3]


@pytest.mark.parametrize("score", [False, True])
async def test_cancelling_in_the_middle_of_prefill_clears_the_prefill_slot(
    text: Bundle, start: Start, score: bool
) -> None:
    model = start(text, slots=1)
    expected = await generate(model, ask(b"b" * 20, max_tokens=3))
    with Gate(model) as gate:
        gone = model.submit(ask(b"a" * 60, score=score))
        next_one = model.submit(ask(b"b" * 20, max_tokens=3))
        await gate.held("prefill")
        await gate.let_one("prefill")
        assert model.engine.placement.prefilling is gone
        assert model.engine.cache.prefill_pushed == text.span
        model.cancel(gone)
        await gate.let_one("prefill")
        assert model.engine.placement.prefilling is next_one
        assert model.engine.cache.prefill_pushed == 0
    assert (await read(model, next_one)).tokens == expected.tokens


@pytest.mark.parametrize("cancel", [False, True])
async def test_a_prefilled_stream_waits_for_its_slot_in_the_prefill_slot(
    text: Bundle, start: Start, cancel: bool
) -> None:
    model = start(text, slots=1, stream_buffer=4)
    with Gate(model) as gate:
        pausing = model.submit(ask(max_tokens=6))
        prefilled = model.submit(ask(b"abc", max_tokens=2))
        await gate.held("step")
        gate.let(4)
        await gate.held("prefill")
        assert model.engine.placement.paused == [pausing]
        events = model.events(pausing)
        first = await anext(events)  # so it returns and takes the slot again
        await gate.let_one("step")
        assert (model.engine.placement.running, model.engine.placement.prefilling) == (
            [pausing],
            prefilled,
        )
        assert model.engine.cache.prefill_pushed == 3
        if cancel:
            model.cancel(prefilled)
            await gate.let_one("step")
            assert model.engine.placement.prefilling is None
    rest = [event async for event in events]
    tokens = [
        token for event in (first, *rest) if isinstance(event, Delta) for token in event.tokens
    ]
    assert tuple(tokens) == (await generate(model, ask(max_tokens=6))).tokens
    if not cancel:
        expected = await generate(model, ask(b"abc", max_tokens=2))
        assert (await read(model, prefilled)).tokens == expected.tokens


async def test_cancelling_a_paused_stream_drops_its_state(text: Bundle, start: Start) -> None:
    model = start(text, slots=1, stream_buffer=4)
    stalled = model.submit(ask(max_tokens=90))
    await until(lambda: model.engine.placement.paused == [stalled])
    assert stalled.saved is not None
    model.cancel(stalled)
    await until(lambda: is_empty(model))
    assert stalled.saved is None
    assert len((await generate(model, ask(max_tokens=90))).tokens) == 90


async def test_cancelling_twice_or_after_the_end_does_nothing(text: Bundle, start: Start) -> None:
    model = start(text, slots=1)
    stream = model.submit(ask())
    await read(model, stream)
    other = model.submit(ask(max_tokens=90))
    for _ in range(3):
        model.cancel(stream)
    assert len((await read(model, other)).tokens) == 90
    for _ in range(3):
        model.cancel(other)
    assert (await generate(model, ask())).tokens
    assert model.engine.ledger.held.streams == 0


async def test_two_hundred_cancels_at_any_moment_leave_nothing(text: Bundle, start: Start) -> None:
    """Each comes during a pass of the model and drops a stream in any place."""
    model = start(text, slots=3, stream_buffer=4, queue_limit=300)
    expected = (await generate(model, ask(b"hello", max_tokens=40))).tokens
    chance, cancelled, to_cancel = random.Random(11), Counter[str](), set[Stream]()

    def cancel_one() -> None:
        placement = model.engine.placement
        prefilling = [placement.prefilling] if placement.prefilling else []
        places = {
            "waiting": placement.waiting,
            "running": placement.running,
            "paused": placement.paused,
        }
        place = chance.choice(["prefill", "prefill", *places])
        found = [
            stream for stream in {**places, "prefill": prefilling}[place] if stream in to_cancel
        ]
        if found:
            stream = chance.choice(found)
            cancelled[place] += 1
            to_cancel.remove(stream)
            model.cancel(stream)

    for name in ("step", "prefill"):
        _before(model, name, cancel_one)
    untouched, readers = [], []
    for number in range(200):
        prompt = b"x" * chance.choice([0, 1, 8, 80])
        limit_s = chance.choice([None, 1000.0])
        stream = model.submit(ask(prompt, max_tokens=16, seed=number, time_limit_s=limit_s))
        to_cancel.add(stream)
        if chance.random() < 0.7:  # the others stall, and are paused
            readers.append(asyncio.create_task(read(model, stream)))
        if number % 40 == 0:
            untouched.append(asyncio.create_task(generate(model, ask(b"hello", max_tokens=40))))
    async with asyncio.timeout(LIMIT_S):
        assert [(await reading).tokens for reading in untouched] == [expected] * 5
        while not is_empty(model):
            await asyncio.sleep(0.001)
            for stream in [s for s in to_cancel if s.paused]:  # nothing else ends these
                to_cancel.discard(stream)
                model.cancel(stream)
    for reader in readers:
        reader.cancel()
    for left in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(left, (Outcome, asyncio.CancelledError)), left
    assert cancelled.keys() == {"waiting", "prefill", "running", "paused"}


def _before(model: DrivenModel, name: str, act: Callable[[], None]) -> None:
    """Acts on the engine's thread before each pass of a kind."""
    run = getattr(model.engine.runtime, name)

    def after_acting(*args: object) -> object:
        act()
        return run(*args)

    setattr(model.engine.runtime, name, after_acting)


# ---- slow readers


async def test_a_slow_reader_is_paused_and_misses_nothing(text: Bundle, start: Start) -> None:
    model = start(text, slots=1, stream_buffer=4)
    expected = await generate(model, ask(b"prompt", max_tokens=60))
    stream = model.submit(ask(b"prompt", max_tokens=60))
    events, tokens, pauses = model.events(stream), list[int](), 0
    async with asyncio.timeout(LIMIT_S):
        while True:
            await until(lambda: stream.paused or stream.ended)
            pauses += stream.paused
            assert stream.subscriber.unread <= 4
            # Its slot is free meanwhile for other streams.
            assert len((await generate(model, ask(max_tokens=3))).tokens) == 3
            event = await anext(events)
            if not isinstance(event, Delta):
                break
            assert event.first_position == 6 + len(tokens)
            tokens += event.tokens
    assert tuple(tokens) == expected.tokens
    assert pauses >= 10
    assert isinstance(event, Finish)


async def test_a_paused_stream_returns_as_soon_as_it_is_read(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader wakes the engine: no other stream may do so."""
    monkeypatch.setattr(Engine, "idle_wait_s", 10 * LIMIT_S)
    model = start(text, slots=1, stream_buffer=4)
    stream, tokens = model.submit(ask(max_tokens=40)), list[int]()
    async with asyncio.timeout(LIMIT_S):
        async for event in model.events(stream):
            tokens += event.tokens if isinstance(event, Delta) else ()
            await until(lambda: stream.paused or stream.ended)
    assert len(tokens) == 40


async def test_slow_readers_beside_fast_ones_get_their_own_tokens(
    text: Bundle, start: Start
) -> None:
    """They are parked and restored into any free row, while others come and go."""
    model = start(text, slots=3, stream_buffer=3)
    wanted = [ask(b"p" * (3 * n), max_tokens=40, seed=n) for n in range(9)]
    expected = [(await generate(model, w)).tokens for w in wanted]

    async def slowly(number: int) -> tuple[int, ...]:
        stream, tokens = model.submit(wanted[number]), list[int]()
        async for event in model.events(stream):
            if isinstance(event, Delta):
                tokens += event.tokens
                await asyncio.sleep(0.004 if number % 3 == 0 else 0)
        return tuple(tokens)

    async with asyncio.timeout(LIMIT_S):
        assert await asyncio.gather(*map(slowly, range(9))) == expected


# ---- time limits and the queue


def _finish(outcome: Outcome) -> Finish:
    assert isinstance(outcome.ending, Finish), outcome.ending
    return outcome.ending


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the clock of engines and streams."""
    clock = Clock()
    for module in (engine, loop, lifecycle, decoding, stream):
        monkeypatch.setattr(module, "time", clock)
    return clock


async def test_a_time_limit_ends_a_stream_that_waits(
    text: Bundle, start: Start, clock: Clock
) -> None:
    model = start(text, slots=1)
    with Gate(model) as gate:
        blocking = model.submit(ask(max_tokens=90))
        hurried = model.submit(ask(b"prompt", time_limit_s=2.5))
        await gate.held("step")
        clock.now += 2.4
        await gate.let_one("step")
        assert not hurried.ended
        clock.now += 0.2
        await gate.let_one("step")
        assert hurried.ended
    finish = _finish(await read(model, hurried))
    assert (finish.reason, finish.generated) == (FinishReason.TIME_LIMIT, 0)
    assert finish.state_bytes == 0
    assert finish.queue_s == finish.first_token_s == finish.total_s == pytest.approx(2.6)
    assert len((await read(model, blocking)).tokens) == 90


async def test_a_time_limit_ends_a_running_stream_with_its_text_so_far(
    text: Bundle, start: Start, clock: Clock
) -> None:
    model = start(text, slots=1)
    script(model, b"one two three".ljust(text.context))
    with Gate(model) as gate:
        stream = model.submit(ask(max_tokens=90, time_limit_s=2.5, stop=("two th!",)))
        await gate.held("step")
        for _ in range(8):  # up to the blank before `three`; all of `two ` is held back
            clock.now += 0.25
            await gate.let_one("step")
        clock.now += 1
        gate.let(1)
        outcome = await read(model, stream)
    assert (bytes(outcome.tokens), outcome.text) == (b"one two t", "one two t")
    finish = _finish(outcome)
    assert (finish.reason, finish.stop, finish.generated) == (FinishReason.TIME_LIMIT, None, 9)
    assert finish.state_bytes == sum(text.state_bytes(9).values())
    assert (finish.queue_s, finish.first_token_s, finish.total_s) == (0.0, 0.25, 3.0)


async def test_a_time_limit_ends_a_stream_in_the_middle_of_its_prompt(
    text: Bundle, start: Start, clock: Clock
) -> None:
    model = start(text)
    with Gate(model) as gate:
        stream = model.submit(ask(b"x" * 60, time_limit_s=2.5))
        await gate.held("prefill")
        clock.now += 3
        gate.let(1)
        finish = _finish(await read(model, stream))
    assert (finish.reason, finish.generated) == (FinishReason.TIME_LIMIT, 0)
    assert (finish.queue_s, finish.total_s) == (0, 3)
    assert finish.state_bytes == sum(text.state_bytes(8).values())


async def test_a_time_limit_ends_a_stream_whose_reader_stalls(text: Bundle, start: Start) -> None:
    model = start(text, slots=1, stream_buffer=4)
    stream = model.submit(ask(max_tokens=90, time_limit_s=0.2))
    await until(lambda: is_empty(model))
    outcome = await read(model, stream)
    assert len(outcome.tokens) == 4
    assert _finish(outcome).reason == FinishReason.TIME_LIMIT
    assert _finish(outcome).state_bytes == sum(text.state_bytes(4).values())


async def test_an_idle_engine_wakes_up_for_a_time_limit(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for its regular wake-up."""
    monkeypatch.setattr(Engine, "idle_wait_s", 60.0)
    model = start(text, slots=1, stream_buffer=1)
    stream = model.submit(ask(max_tokens=90, time_limit_s=0.1))
    finish = _finish(await _after(stream, model))
    assert 0.1 <= finish.total_s < LIMIT_S


async def _after(stream: Stream, model: DrivenModel) -> Outcome:
    """The outcome of a stream, read after its end."""
    await until(lambda: stream.ended)
    return await read(model, stream)


async def test_a_full_queue_refuses_at_once(text: Bundle, start: Start) -> None:
    model = start(text, slots=1, queue_limit=2)
    with Gate(model) as gate:
        streams = [model.submit(ask(b"abc")) for _ in range(3)]
        await gate.held("prefill")
        with pytest.raises(Overloaded) as caught:
            model.submit(ask())
        message = caught.value.message
        for part in ("tiny-text", "3 of at most 3 streams", "adds 1", "--queue-limit", "later"):
            assert part in message
        assert caught.value.retry_after_s is not None
        assert caught.value.retryable
        model.cancel(streams[1])
        gate.let(1)
        await until(lambda: model.engine.ledger.held.streams == 2)
        streams[1] = model.submit(ask(b"abc"))
    assert [len((await read(model, s)).tokens) for s in streams] == [8, 8, 8]


# ---- fairness


@pytest.mark.parametrize("share", [0.2, 0.5])
async def test_prompts_do_not_starve_running_streams(
    text: Bundle, start: Start, clock: Clock, share: float
) -> None:
    """A chunk takes as long as three steps, and prompts never end: steps get their share."""
    passes: list[str] = []
    model = start(text, slots=32, prefill_share=share)

    def timed(name: str, seconds: float) -> None:
        def pass_time() -> None:
            clock.now += seconds
            passes.append(name)

        _before(model, name, pass_time)

    timed("step", 0.01)
    timed("prefill", 0.03)
    with together(model):
        running = model.submit(ask(max_tokens=90))
        prompts = [model.submit(ask(b"x" * 80, max_tokens=1)) for _ in range(20)]
    await asyncio.gather(*[read(model, s) for s in (running, *prompts)])
    shared = passes[: 90 - 1]
    prefill_s, step_s = 0.03 * shared.count("prefill"), 0.01 * shared.count("step")
    assert prefill_s / (prefill_s + step_s) == pytest.approx(share, abs=0.06)
    assert "prefill prefill" not in " ".join(shared)


async def test_a_pass_of_prefill_is_no_longer_than_its_limit(text: Bundle, start: Start) -> None:
    model, passes = start(text, prefill_chunk=3), list[int]()
    prefill = model.engine.cache.prefill

    def noted(tokens: Ints, logits: bool = False) -> Floats:
        passes.append(len(tokens))
        return prefill(tokens, logits)

    model.engine.cache.prefill = noted  # type: ignore[method-assign]
    await read(model, model.submit(ask(b"x" * 20, max_tokens=1)))
    assert passes == [3, 3, 2, 3, 3, 2, 3, 1]  # blocks are of 8 tokens


async def test_a_prompt_seen_before_is_pushed_from_its_last_block_on(
    text: Bundle, start: Start
) -> None:
    model, passes = start(text, prefix_cache_bytes=10**6), list[int]()
    prefill = model.engine.cache.prefill

    def noted(tokens: Ints, logits: bool = False) -> Floats:
        passes.append(len(tokens))
        return prefill(tokens, logits)

    model.engine.cache.prefill = noted  # type: ignore[method-assign]
    first = await read(model, model.submit(ask(b"x" * 20, max_tokens=5)))
    assert passes == [8, 8, 4]
    passes.clear()
    again = await read(model, model.submit(ask(b"x" * 20, max_tokens=5)))
    assert (passes, again.tokens) == ([4], first.tokens)
    passes.clear()
    scored = [await read(model, model.submit(ask(b"x" * 20, score=True))) for _ in range(2)]
    assert passes == [8, 8, 4] * 2
    assert scored[0].ending == scored[1].ending
    assert model.engine.cache.prefix_bytes > 0


async def test_streams_begin_in_the_order_of_arrival(text: Bundle, start: Start) -> None:
    model, begun = start(text, slots=2), list[Stream]()
    begin = model.engine.streams.start

    def noted(stream: Stream) -> None:
        begun.append(stream)
        begin(stream)

    model.engine.streams.start = noted  # type: ignore[method-assign]
    with Gate(model) as gate:
        streams = [
            model.submit(ask(b"x" * length, max_tokens=2, score=length == 9))
            for length in (0, 30, 0, 9, 0, 1, 0, 9, 17)
        ]
        await gate.held("step")
    await asyncio.gather(*[read(model, s) for s in streams])
    assert begun == streams

"""Who waits, who is dropped, who is late: what an engine does with those it serves."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import pytest

from server.bundles.bundle import Bundle
from server.engine import decoding as passes_module
from server.engine import loop as loop_module
from server.engine import stream as stream_module
from server.engine.engine import Engine
from server.engine.events import Delta, Finish, FinishReason
from server.engine.stream import Stream
from server.errors import Overloaded
from server.runtime.onnx_session import Floats, Ints
from tests.server.engines import (
    LIMIT_S,
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

Start = Callable[..., Engine]


# ---- cancelling


async def test_cancelling_a_running_stream_frees_its_slot_before_the_next_step(
    text: Bundle, start: Start
) -> None:
    engine = start(text, slots=1)
    with Gate(engine) as gate:
        gone, next_one = engine.submit(ask(max_tokens=90)), engine.submit(ask(max_tokens=2))
        await gate.held("step")
        await gate.let_one("step")
        assert engine._loop.places.running == [gone]
        engine.cancel(gone)
        await gate.let_one("step")
        assert engine._loop.places.running == [next_one]
        assert gone.generated == 2  # the step in flight, and no more
        assert engine._loop.ledger.held.streams == 1
    assert len((await read(engine, next_one)).tokens) == 2


async def test_cancelling_a_waiting_stream_takes_it_out_of_the_queue(
    text: Bundle, start: Start
) -> None:
    engine = start(text, slots=1)
    with Gate(engine) as gate:
        running, gone, last = (engine.submit(ask(max_tokens=3)) for _ in range(3))
        await gate.held("step")
        await gate.let_one("step")
        assert list(engine._loop.places.waiting) == [gone, last]
        engine.cancel(gone)
        await gate.let_one("step")
        assert list(engine._loop.places.waiting) == [last]
        assert engine._loop.ledger.held.streams == 2
    assert [len((await read(engine, s)).tokens) for s in (running, last)] == [3, 3]


@pytest.mark.parametrize("score", [False, True])
async def test_cancelling_in_the_middle_of_prefill_clears_the_bench(
    text: Bundle, start: Start, score: bool
) -> None:
    engine = start(text, slots=1)
    expected = await generate(engine, ask(b"b" * 20, max_tokens=3))
    with Gate(engine) as gate:
        gone = engine.submit(ask(b"a" * 60, score=score))
        next_one = engine.submit(ask(b"b" * 20, max_tokens=3))
        await gate.held("prefill")
        await gate.let_one("prefill")
        assert engine._loop.places.bench is gone
        assert engine._loop.cache.bench_pushed == text.span
        engine.cancel(gone)
        await gate.let_one("prefill")
        assert engine._loop.places.bench is next_one
        assert engine._loop.cache.bench_pushed == 0
    assert (await read(engine, next_one)).tokens == expected.tokens


@pytest.mark.parametrize("cancel", [False, True])
async def test_a_prefilled_stream_waits_for_its_slot_on_the_bench(
    text: Bundle, start: Start, cancel: bool
) -> None:
    engine = start(text, slots=1, stream_buffer=4)
    with Gate(engine) as gate:
        pausing = engine.submit(ask(max_tokens=6))
        prefilled = engine.submit(ask(b"abc", max_tokens=2))
        await gate.held("step")
        gate.let(4)
        await gate.held("prefill")
        assert engine._loop.places.paused == [pausing]
        events = engine.events(pausing)
        first = await anext(events)  # so it comes back, and takes the slot again
        await gate.let_one("step")
        assert (engine._loop.places.running, engine._loop.places.bench) == ([pausing], prefilled)
        assert engine._loop.cache.bench_pushed == 3
        if cancel:
            engine.cancel(prefilled)
            await gate.let_one("step")
            assert engine._loop.places.bench is None
    rest = [event async for event in events]
    tokens = [
        token for event in (first, *rest) if isinstance(event, Delta) for token in event.tokens
    ]
    assert tuple(tokens) == (await generate(engine, ask(max_tokens=6))).tokens
    if not cancel:
        expected = await generate(engine, ask(b"abc", max_tokens=2))
        assert (await read(engine, prefilled)).tokens == expected.tokens


async def test_cancelling_a_paused_stream_drops_its_state(text: Bundle, start: Start) -> None:
    engine = start(text, slots=1, stream_buffer=4)
    stalled = engine.submit(ask(max_tokens=90))
    await until(lambda: engine._loop.places.paused == [stalled])
    assert stalled.parked is not None
    engine.cancel(stalled)
    await until(lambda: is_empty(engine))
    assert stalled.parked is None
    assert len((await generate(engine, ask(max_tokens=90))).tokens) == 90


async def test_cancelling_twice_or_after_the_end_does_nothing(text: Bundle, start: Start) -> None:
    engine = start(text, slots=1)
    stream = engine.submit(ask())
    await read(engine, stream)
    other = engine.submit(ask(max_tokens=90))
    for _ in range(3):
        engine.cancel(stream)
    assert len((await read(engine, other)).tokens) == 90
    for _ in range(3):
        engine.cancel(other)
    assert (await generate(engine, ask())).tokens
    assert engine._loop.ledger.held.streams == 0


async def test_two_hundred_cancels_at_any_moment_leave_nothing(text: Bundle, start: Start) -> None:
    """Each comes while a pass of the model runs, and strikes whoever waits, runs or is paused."""
    engine = start(text, slots=3, stream_buffer=4, queue_limit=300)
    expected = (await generate(engine, ask(b"hello", max_tokens=40))).tokens
    chance, struck, doomed = random.Random(11), Counter[str](), set[Stream]()

    def strike() -> None:
        bench = [engine._loop.places.bench] if engine._loop.places.bench else []
        places = {
            "waiting": engine._loop.places.waiting,
            "running": engine._loop.places.running,
            "paused": engine._loop.places.paused,
        }
        place = chance.choice(["bench", "bench", *places])
        found = [stream for stream in {**places, "bench": bench}[place] if stream in doomed]
        if found:
            stream = chance.choice(found)
            struck[place] += 1
            doomed.remove(stream)
            engine.cancel(stream)

    for name in ("step", "prefill"):
        _before(engine, name, strike)
    patients, readers = [], []
    for number in range(200):
        prompt = b"x" * chance.choice([0, 1, 8, 80])
        limit_s = chance.choice([None, 1000.0])
        stream = engine.submit(ask(prompt, max_tokens=16, seed=number, time_limit_s=limit_s))
        doomed.add(stream)
        if chance.random() < 0.7:  # the others stall, and are paused
            readers.append(asyncio.create_task(read(engine, stream)))
        if number % 40 == 0:
            patients.append(asyncio.create_task(generate(engine, ask(b"hello", max_tokens=40))))
    async with asyncio.timeout(LIMIT_S):
        assert [(await patient).tokens for patient in patients] == [expected] * 5
        while not is_empty(engine):
            await asyncio.sleep(0.001)
            for stream in [s for s in doomed if s.paused]:  # nobody else would ever end these
                doomed.discard(stream)
                engine.cancel(stream)
    for reader in readers:
        reader.cancel()
    for left in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(left, (Outcome, asyncio.CancelledError)), left
    assert struck.keys() == {"waiting", "bench", "running", "paused"}


def _before(engine: Engine, name: str, act: Callable[[], None]) -> None:
    """Acts on the engine's thread before each pass of a kind."""
    run = getattr(engine._loop.runtime, name)

    def after_acting(*args: object) -> object:
        act()
        return run(*args)

    setattr(engine._loop.runtime, name, after_acting)


# ---- slow readers


async def test_a_slow_reader_is_paused_and_misses_nothing(text: Bundle, start: Start) -> None:
    engine = start(text, slots=1, stream_buffer=4)
    expected = await generate(engine, ask(b"prompt", max_tokens=60))
    stream = engine.submit(ask(b"prompt", max_tokens=60))
    events, tokens, pauses = engine.events(stream), list[int](), 0
    async with asyncio.timeout(LIMIT_S):
        while True:
            await until(lambda: stream.paused or stream.ended)
            pauses += stream.paused
            assert stream.unread <= 4
            # Its slot is free meanwhile: others are served.
            assert len((await generate(engine, ask(max_tokens=3))).tokens) == 3
            event = await anext(events)
            if not isinstance(event, Delta):
                break
            assert event.first_position == 6 + len(tokens)
            tokens += event.tokens
    assert tuple(tokens) == expected.tokens
    assert pauses >= 10
    assert isinstance(event, Finish)


async def test_a_paused_stream_comes_back_as_soon_as_it_was_read(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader wakes the engine: there may be nobody else to do so."""
    monkeypatch.setattr(loop_module, "_IDLE_WAIT_S", 10 * LIMIT_S)
    engine = start(text, slots=1, stream_buffer=4)
    stream, tokens = engine.submit(ask(max_tokens=40)), list[int]()
    async with asyncio.timeout(LIMIT_S):
        async for event in engine.events(stream):
            tokens += event.tokens if isinstance(event, Delta) else ()
            await until(lambda: stream.paused or stream.ended)
    assert len(tokens) == 40


async def test_slow_readers_beside_fast_ones_get_their_own_tokens(
    text: Bundle, start: Start
) -> None:
    """Parked and restored into whatever row is free, while others come and go."""
    engine = start(text, slots=3, stream_buffer=3)
    wanted = [ask(b"p" * (3 * n), max_tokens=40, seed=n) for n in range(9)]
    expected = [(await generate(engine, w)).tokens for w in wanted]

    async def slowly(number: int) -> tuple[int, ...]:
        stream, tokens = engine.submit(wanted[number]), list[int]()
        async for event in engine.events(stream):
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
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of engines and streams that are made from now on."""
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    monkeypatch.setattr(passes_module, "time", clock)
    monkeypatch.setattr(stream_module, "time", clock)
    return clock


async def test_a_time_limit_ends_a_stream_that_waits(
    text: Bundle, start: Start, clock: Clock
) -> None:
    engine = start(text, slots=1)
    with Gate(engine) as gate:
        blocking = engine.submit(ask(max_tokens=90))
        hurried = engine.submit(ask(b"prompt", time_limit_s=2.5))
        await gate.held("step")
        clock.now += 2.4
        await gate.let_one("step")
        assert not hurried.ended
        clock.now += 0.2
        await gate.let_one("step")
        assert hurried.ended
    finish = _finish(await read(engine, hurried))
    assert (finish.reason, finish.generated) == (FinishReason.TIME_LIMIT, 0)
    assert finish.state_bytes == 0
    assert finish.queue_s == finish.first_token_s == finish.total_s == pytest.approx(2.6)
    assert len((await read(engine, blocking)).tokens) == 90


async def test_a_time_limit_ends_a_stream_that_runs_with_what_is_there(
    text: Bundle, start: Start, clock: Clock
) -> None:
    engine = start(text, slots=1)
    script(engine, b"one two three".ljust(text.context))
    with Gate(engine) as gate:
        stream = engine.submit(ask(max_tokens=90, time_limit_s=2.5, stop=("two th!",)))
        await gate.held("step")
        for _ in range(8):  # up to the blank before `three`; all of `two ` is held back
            clock.now += 0.25
            await gate.let_one("step")
        clock.now += 1
        gate.let(1)
        outcome = await read(engine, stream)
    assert (bytes(outcome.tokens), outcome.text) == (b"one two t", "one two t")
    finish = _finish(outcome)
    assert (finish.reason, finish.stop, finish.generated) == (FinishReason.TIME_LIMIT, None, 9)
    assert finish.state_bytes == sum(text.state_bytes(9).values())
    assert (finish.queue_s, finish.first_token_s, finish.total_s) == (0.0, 0.25, 3.0)


async def test_a_time_limit_ends_a_stream_in_the_middle_of_its_prompt(
    text: Bundle, start: Start, clock: Clock
) -> None:
    engine = start(text)
    with Gate(engine) as gate:
        stream = engine.submit(ask(b"x" * 60, time_limit_s=2.5))
        await gate.held("prefill")
        clock.now += 3
        gate.let(1)
        finish = _finish(await read(engine, stream))
    assert (finish.reason, finish.generated) == (FinishReason.TIME_LIMIT, 0)
    assert (finish.queue_s, finish.total_s) == (0, 3)
    assert finish.state_bytes == sum(text.state_bytes(8).values())


async def test_a_time_limit_ends_a_stream_whose_reader_stalls(text: Bundle, start: Start) -> None:
    engine = start(text, slots=1, stream_buffer=4)
    stream = engine.submit(ask(max_tokens=90, time_limit_s=0.2))
    await until(lambda: is_empty(engine))
    outcome = await read(engine, stream)
    assert len(outcome.tokens) == 4
    assert _finish(outcome).reason == FinishReason.TIME_LIMIT
    assert _finish(outcome).state_bytes == sum(text.state_bytes(4).values())


async def test_an_idle_engine_wakes_up_for_a_time_limit(
    text: Bundle, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not just when it would have looked around anyway."""
    monkeypatch.setattr(loop_module, "_IDLE_WAIT_S", 60.0)
    engine = start(text, slots=1, stream_buffer=1)
    stream = engine.submit(ask(max_tokens=90, time_limit_s=0.1))
    finish = _finish(await _after(stream, engine))
    assert 0.1 <= finish.total_s < LIMIT_S


async def _after(stream: Stream, engine: Engine) -> Outcome:
    """What a reader gets who looks only when all is over."""
    await until(lambda: stream.ended)
    return await read(engine, stream)


async def test_a_full_queue_refuses_at_once(text: Bundle, start: Start) -> None:
    engine = start(text, slots=1, queue_limit=2)
    with Gate(engine) as gate:
        streams = [engine.submit(ask(b"abc")) for _ in range(3)]
        await gate.held("prefill")
        with pytest.raises(Overloaded) as caught:
            engine.submit(ask())
        message = caught.value.message
        for part in ("tiny-text", "3 of at most 3 streams", "adds 1", "--queue-limit", "later"):
            assert part in message
        assert caught.value.retry_after_s is not None
        assert caught.value.retryable
        engine.cancel(streams[1])
        gate.let(1)
        await until(lambda: engine._loop.ledger.held.streams == 2)
        streams[1] = engine.submit(ask(b"abc"))
    assert [len((await read(engine, s)).tokens) for s in streams] == [8, 8, 8]


# ---- fairness


@pytest.mark.parametrize("share", [0.2, 0.5])
async def test_prompts_do_not_starve_running_streams(
    text: Bundle, start: Start, clock: Clock, share: float
) -> None:
    """A chunk takes three times a step, and prompts never end: steps get the rest of the time."""
    passes: list[str] = []
    engine = start(text, slots=32, prefill_share=share)

    def timed(name: str, seconds: float) -> None:
        def pass_time() -> None:
            clock.now += seconds
            passes.append(name)

        _before(engine, name, pass_time)

    timed("step", 0.01)
    timed("prefill", 0.03)
    with together(engine):
        running = engine.submit(ask(max_tokens=90))
        prompts = [engine.submit(ask(b"x" * 80, max_tokens=1)) for _ in range(20)]
    await asyncio.gather(*[read(engine, s) for s in (running, *prompts)])
    shared = passes[: 90 - 1]
    prefill_s, step_s = 0.03 * shared.count("prefill"), 0.01 * shared.count("step")
    assert prefill_s / (prefill_s + step_s) == pytest.approx(share, abs=0.06)
    assert "prefill prefill" not in " ".join(shared)


async def test_a_pass_of_prefill_is_no_longer_than_its_limit(text: Bundle, start: Start) -> None:
    engine, passes = start(text, prefill_chunk=3), list[int]()
    prefill = engine._loop.cache.prefill

    def noted(tokens: Ints, logits: bool = False) -> Floats:
        passes.append(len(tokens))
        return prefill(tokens, logits)

    engine._loop.cache.prefill = noted  # type: ignore[method-assign]
    await read(engine, engine.submit(ask(b"x" * 20, max_tokens=1)))
    assert passes == [3, 3, 2, 3, 3, 2, 3, 1]  # blocks are of 8 tokens


async def test_a_prompt_seen_before_is_pushed_from_its_last_block_on(
    text: Bundle, start: Start
) -> None:
    engine, passes = start(text, prefix_cache_bytes=10**6), list[int]()
    prefill = engine._loop.cache.prefill

    def noted(tokens: Ints, logits: bool = False) -> Floats:
        passes.append(len(tokens))
        return prefill(tokens, logits)

    engine._loop.cache.prefill = noted  # type: ignore[method-assign]
    first = await read(engine, engine.submit(ask(b"x" * 20, max_tokens=5)))
    assert passes == [8, 8, 4]
    passes.clear()
    again = await read(engine, engine.submit(ask(b"x" * 20, max_tokens=5)))
    assert (passes, again.tokens) == ([4], first.tokens)
    passes.clear()
    scored = [await read(engine, engine.submit(ask(b"x" * 20, score=True))) for _ in range(2)]
    assert passes == [8, 8, 4] * 2
    assert scored[0].ending == scored[1].ending
    assert engine._loop.cache.prefix_bytes > 0


async def test_streams_are_begun_in_the_order_they_came(text: Bundle, start: Start) -> None:
    engine, begun = start(text, slots=2), list[Stream]()
    begin = engine._loop._start

    def noted(stream: Stream) -> None:
        begun.append(stream)
        begin(stream)

    engine._loop._start = noted  # type: ignore[method-assign]
    with Gate(engine) as gate:
        streams = [
            engine.submit(ask(b"x" * length, max_tokens=2, score=length == 9))
            for length in (0, 30, 0, 9, 0, 1, 0, 9, 17)
        ]
        await gate.held("step")
    await asyncio.gather(*[read(engine, s) for s in streams])
    assert begun == streams

"""Streams of higher priority go first, and no stream loses a token."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason
from server.engine.stream import Stream
from server.request import LogitsProcessors, SamplingParameters
from tests.server.engines import (
    LIMIT_S,
    DrivenModel,
    Gate,
    ask,
    generate,
    is_empty,
    read,
    together,
    until,
)
from tests.server.ops.test_metrics import value_of

Start = Callable[..., DrivenModel]


def _count_pushed(model: DrivenModel) -> list[int]:
    """Records the number of tokens of each later pass of prefill."""
    cache: Any = model.engine.cache
    prefill, pushed = cache.prefill, list[int]()

    def noted(tokens: Any, logits: bool = False) -> Any:
        pushed.append(len(tokens))
        return prefill(tokens, logits)

    cache.prefill = noted
    return pushed


@pytest.mark.parametrize("prompt", [b"", b"the prompt of the higher one"])
async def test_a_preempted_stream_equals_an_undisturbed_one(
    text: Bundle, start: Start, prompt: bytes
) -> None:
    """It is parked at any point of a block, and restored without pushing a token again."""
    model = start(text, slots=1)
    counting = SamplingParameters(
        seed=3, processors=LogitsProcessors(frequency_penalty=2)
    )  # remembers
    low = ask(b"low", max_tokens=60, sampling=counting)
    high = ask(prompt, max_tokens=5, seed=4, priority=1)
    twin, other = await generate(model, low), await generate(model, high)
    before, pushed = value_of("streams_preempted_total"), _count_pushed(model)
    step = model.engine.runtime.step

    def unhurried(*batch: Any) -> Any:
        time.sleep(0.01)  # so that it still runs when the next of the others comes
        return step(*batch)

    model.engine.runtime.step = unhurried  # type: ignore[method-assign]
    stream = model.submit(low)
    reading = asyncio.create_task(read(model, stream))
    times = 6
    for tokens in range(times):
        await until(lambda n=7 * tokens: stream.generated > n)  # type: ignore[misc]
        assert (await generate(model, high)).tokens == other.tokens
    outcome = await reading
    assert (outcome.tokens, outcome.text) == (twin.tokens, twin.text)
    assert value_of("streams_preempted_total") - before == pytest.approx(times, abs=2)
    assert sum(pushed) == 3 + times * len(prompt)


async def test_a_higher_priority_gets_the_slot_before_the_next_step(
    text: Bundle, start: Start
) -> None:
    model = start(text, slots=2)
    with Gate(model) as gate:
        first, latest = model.submit_together([ask(max_tokens=9), ask(max_tokens=9)])
        await gate.held("step")
        await gate.let_one("step")
        high = model.submit(ask(max_tokens=3, priority=5))
        await gate.let_one("step")
        # The stream of lowest priority and latest arrival is parked, and keeps its queue position.
        assert model.engine.placement.running == [
            first,
            high,
        ] and model.engine.placement.waiting == [latest]
        equal, higher = model.submit(ask()), model.submit(ask(max_tokens=2, priority=6))
        await gate.let_one("step")
        assert model.engine.placement.running == [
            high,
            higher,
        ] or model.engine.placement.running == [
            higher,
            high,
        ]
        assert model.engine.placement.waiting == [first, latest, equal]
        assert latest.generated == 2 and latest.saved is not None
    for stream in (first, latest, high, equal, higher):
        await read(model, stream)


async def test_equal_priorities_do_not_preempt_each_other(text: Bundle, start: Start) -> None:
    model, before = start(text, slots=2, stream_buffer=4), value_of("streams_preempted_total")
    streams = [model.submit(ask(b"x" * (n % 3), max_tokens=12, priority=3)) for n in range(12)]
    await asyncio.gather(*[read(model, stream) for stream in streams])
    assert value_of("streams_preempted_total") == before


async def test_the_queue_is_ordered_by_priority_then_arrival(text: Bundle, start: Start) -> None:
    model, begun = start(text, slots=1), list[Stream]()
    begin = model.engine.streams.start

    def noted(stream: Stream) -> None:
        begun.append(stream)
        begin(stream)

    model.engine.streams.start = noted  # type: ignore[method-assign]
    with together(model):
        streams = [
            model.submit(ask(b"x" * (n % 2), max_tokens=2, priority=priority))
            for n, priority in enumerate((0, -5, 3, 0, 3, -5, 100))
        ]
    await asyncio.gather(*[read(model, stream) for stream in streams])
    first_time = list(dict.fromkeys(begun))
    assert first_time == sorted(streams, key=lambda s: (-s.request.priority, streams.index(s)))


async def test_a_preempted_stream_keeps_its_time_limit_and_can_be_cancelled(
    text: Bundle, start: Start
) -> None:
    model = start(text, slots=1)
    with Gate(model) as gate:
        limited = model.submit(ask(max_tokens=90, time_limit_s=0.3))
        await gate.held("step")
        await gate.let_one("step")
        high = model.submit(ask(max_tokens=90, priority=1))
        await gate.let_one("step")
        assert model.engine.placement.waiting == [limited]
        dropped = model.submit(ask(max_tokens=90, priority=2))
        highest = model.submit(ask(max_tokens=3, priority=3))
        await gate.let_one("step")
        await asyncio.sleep(0.4)
        model.cancel(high)
        model.cancel(dropped)
        gate.let(float("inf"))
        ending = (await read(model, limited)).ending
        assert isinstance(ending, Finish) and ending.reason == FinishReason.TIME_LIMIT
        assert (ending.generated, ending.state_bytes) == (2, sum(text.state_bytes(2).values()))
    await read(model, highest)
    await until(lambda: is_empty(model))


async def test_priorities_slow_readers_and_prompts_together(text: Bundle, start: Start) -> None:
    """Streams are parked for all reasons at once: each gets the tokens that it gets alone."""
    model, chance = start(text, slots=2, stream_buffer=5), random.Random(2)
    wanted = [
        ask(b"p" * chance.choice([0, 1, 9, 30]), max_tokens=30, seed=n, priority=n % 4)
        for n in range(16)
    ]
    expected = [(await generate(model, one)).tokens for one in wanted]
    before = value_of("streams_preempted_total")

    async def slowly(number: int) -> tuple[int, ...]:
        await asyncio.sleep(0.003 * number)
        stream, tokens = model.submit(wanted[number]), list[int]()
        async for event in model.events(stream):
            tokens += getattr(event, "tokens", ())
            await asyncio.sleep(0.004 if number % 3 == 0 else 0)
        return tuple(tokens)

    async with asyncio.timeout(LIMIT_S):
        assert await asyncio.gather(*map(slowly, range(16))) == expected
    assert value_of("streams_preempted_total") > before

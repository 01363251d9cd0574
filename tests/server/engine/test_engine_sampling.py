"""Options of sampling and output, through a whole engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from server.arrays import Floats, Ints
from server.bundles.bundle import Bundle
from server.checkpoint import Finish, FinishReason
from server.engine.sampling.sampler import uniform
from server.engine.stream import Stream
from server.errors import InvalidRequest, Overloaded, StepFailed
from server.request import LogitsProcessors, Request, SamplingParameters, prompt_of
from server.sessions.subscriber import Delta, PromptLogprobs
from tests.server.engine.sampling import plain_sampler
from tests.server.engines import (
    LIMIT_S,
    DrivenModel,
    Gate,
    ask,
    change_logits,
    generate,
    is_empty,
    read,
    script,
    until,
)

Start = Callable[..., DrivenModel]
Logits = Callable[[list[int]], npt.NDArray[np.float64]]

EVERYTHING = LogitsProcessors(
    bias=((32, 1.0), (101, -2.0)),
    allowed=tuple(range(1, 200)),
    bad_words=((5,), (60, 61), (1, 2, 3)),
    min_tokens=20,
    withheld=(0, 9),
    repetition_penalty=1.4,
    frequency_penalty=0.3,
    presence_penalty=0.6,
)


def _outputs(request: Request, count: int) -> list[Request]:
    return [
        replace(request, sampling=replace(request.sampling, output=output))
        for output in range(count)
    ]


async def _read_together(model: DrivenModel, streams: Sequence[Stream]) -> list[list[Any]]:
    """The events of each stream."""
    events: dict[Stream, list[Any]] = {stream: [] for stream in streams}
    async with asyncio.timeout(LIMIT_S):
        async for stream, event in model.events_together(streams):
            events[stream].append(event)
    return list(events.values())


def _tokens(events: list[Any]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]


async def test_all_options_at_once_match_the_plain_sampler(text: Bundle, start: Start) -> None:
    """Other streams come and go, and it is parked whenever its reader lags."""
    model = start(text, slots=3, stream_buffer=4)
    seen: dict[int, list[float]] = {}

    def note(logits: Floats, positions: Ints) -> Floats:
        for row, stream in enumerate(model.engine.placement.running):
            if stream is watched:
                seen[int(positions[row])] = logits[row].tolist()
        return logits

    change_logits(model, note)
    sampling = SamplingParameters(0.9, 150, 0.97, 0.001, 5, typical_p=0.98, processors=EVERYTHING)
    watched = model.submit(ask(b"\x01\x02<", max_tokens=60, sampling=sampling))
    others = [asyncio.create_task(generate(model, ask(max_tokens=7 + n, seed=n))) for n in range(9)]
    events = []
    async for event in model.events(watched):
        events.append(event)
        if len(events) in range(2, 6):  # the first one comes before all tokens
            await until(lambda: watched.paused)
    await asyncio.gather(*others)
    assert len(events) > 6
    prompt, output = [1, 2, ord("<")], list[int]()
    for token in _tokens(events):
        position = 3 + len(output)
        expected = plain_sampler.distribution(seen[position], sampling, prompt, output)
        assert expected is not None
        number = uniform(np.array([5], np.uint64), np.array([position]))[0]
        assert token == plain_sampler.draw(expected, float(number))
        output.append(token)
    assert len(output) == 60


async def test_a_stream_with_processors_is_the_same_alone_and_among_others(
    text: Bundle, start: Start
) -> None:
    model = start(text, slots=3)
    rng = np.random.default_rng(2)
    requests = [
        ask(
            bytes(rng.integers(1, 99, size=int(rng.integers(9))).tolist()),
            max_tokens=int(rng.integers(5, 40)),
            sampling=SamplingParameters(seed=n, processors=EVERYTHING if n % 3 else None),
        )
        for n in range(12)
    ]
    alone = [(await generate(model, wanted)).tokens for wanted in requests]
    crowd = await asyncio.gather(*[generate(model, wanted) for wanted in requests])
    assert [outcome.tokens for outcome in crowd] == alone


async def test_a_parked_stream_holds_no_memory_of_its_batch(text: Bundle, start: Start) -> None:
    model = start(text, slots=2, stream_buffer=4)
    sampling = SamplingParameters(processors=EVERYTHING)
    streams = [model.submit(ask(max_tokens=30, sampling=sampling)) for _ in range(2)]
    await until(lambda: len(model.engine.placement.paused) == 2)
    states = [stream.penalties for stream in streams]
    for stream in streams:
        model.cancel(stream)
    assert all(state is not None and state.counts.base is None for state in states)


# ---- several outputs


@pytest.mark.parametrize("prompt", [b"", b"a", b"a prompt of more than two blocks"])
async def test_outputs_share_only_their_prefill(text: Bundle, start: Start, prompt: bytes) -> None:
    model = start(text, slots=3)
    pushed: list[int] = []
    prefill = model.engine.runtime.prefill

    def count(row: int, tokens: Ints, *rest: Any) -> Floats:
        pushed.append(len(tokens))
        return prefill(row, tokens, *rest)

    model.engine.runtime.prefill = count  # type: ignore[method-assign]
    sampling = SamplingParameters(seed=3, processors=LogitsProcessors(frequency_penalty=1.0))
    requests = _outputs(ask(prompt, max_tokens=30, sampling=sampling), 7)
    alone = [(await generate(model, wanted)).tokens for wanted in requests]
    assert len(set(alone)) == 7
    assert sum(pushed) == 7 * len(prompt)
    pushed.clear()
    together = await _read_together(model, model.submit_together(requests))
    assert [tuple(_tokens(events)) for events in together] == alone
    assert sum(pushed) == len(prompt)
    assert all(isinstance(events[-1], Finish) for events in together)


async def test_outputs_are_admitted_all_or_none(text: Bundle, start: Start) -> None:
    model = start(text, slots=2, queue_limit=2)
    with Gate(model):
        kept = [*model.submit_together(_outputs(ask(b"x", max_tokens=2), 3))]
        with pytest.raises(Overloaded):
            model.submit_together(_outputs(ask(max_tokens=2), 2))
        kept.append(model.submit(ask(max_tokens=2)))
        assert model.engine.ledger.held.streams == 4
    for stream in kept:
        assert len((await read(model, stream)).tokens) == 2


async def test_when_the_first_output_goes_the_next_prefills(text: Bundle, start: Start) -> None:
    model = start(text, slots=2)
    requests = _outputs(ask(b"b" * 20, max_tokens=3), 3)
    alone = [(await generate(model, wanted)).tokens for wanted in requests]
    with Gate(model) as gate:
        first, *others = model.submit_together(requests)
        await gate.held("prefill")
        await gate.let_one("prefill")
        assert model.engine.placement.prefilling is first
        model.cancel(first)
        await gate.let_one("prefill")
        assert model.engine.placement.prefilling is others[0]
    assert [(await read(model, stream)).tokens for stream in others] == alone[1:]


async def test_outputs_dropped_at_any_moment_leave_nothing(text: Bundle, start: Start) -> None:
    model = start(text, slots=2, stream_buffer=4)
    for passes in range(14):
        with Gate(model) as gate:
            streams = model.submit_together(_outputs(ask(b"c" * 12, max_tokens=9), 4))
            gate.let(passes)
            await until(lambda gate=gate: gate.standing or len(model.engine.placement.paused) == 4)
            for stream in streams:
                model.cancel(stream)
        await until(lambda: is_empty(model))
        assert all(stream.saved is None for stream in streams)


async def test_one_output_that_is_not_read_does_not_stop_the_others(
    text: Bundle, start: Start
) -> None:
    """Each output gets at most one buffer ahead."""
    model = start(text, slots=4, stream_buffer=4)
    requests = _outputs(ask(b"d", max_tokens=40), 3)
    alone = [(await generate(model, wanted)).tokens for wanted in requests]
    streams = model.submit_together(requests)
    got: dict[Stream, list[int]] = {stream: [] for stream in streams}
    async for stream, event in model.events_together(streams):
        if isinstance(event, Delta):
            got[stream] += event.tokens
            await asyncio.sleep(0.002)
            assert max(s.subscriber.unread for s in streams) <= 4
    assert [tuple(tokens) for tokens in got.values()] == alone


# ---- log-probabilities


@pytest.mark.parametrize("length", [0, 1, 8, 9, 21])
async def test_logprobs_are_those_of_the_model(
    bundle: Bundle, start: Start, exact_logits: Callable[[Bundle], Logits], length: int
) -> None:
    """They are of its own distribution, before temperature, filters and processors."""
    model, exact = start(bundle), exact_logits(bundle)
    vocabulary = bundle.manifest.vocabulary
    ids = np.random.default_rng(length).integers(1, 16, size=length)
    prompt = prompt_of(vocabulary, ids, bundle.typecode)
    processors = LogitsProcessors(bias=((3, 5.0),), repetition_penalty=2.0)
    sampling = SamplingParameters(0.3, 5, seed=1, logprobs=4, processors=processors)
    wanted = Request(prompt, sampling, max_tokens=12, prompt_logprobs=2)
    (events,) = await _read_together(model, model.submit_together([wanted]))
    prompt_events = [event for event in events if isinstance(event, PromptLogprobs)]
    deltas = [event for event in events if isinstance(event, Delta)]
    assert events[: len(prompt_events)] == prompt_events
    starts = np.cumsum([0, *(len(event.logprobs) for event in prompt_events)])
    assert [event.first_position for event in prompt_events] == starts[:-1].tolist()
    logprobs = [one for event in [*prompt_events, *deltas] for one in event.logprobs]
    tokens = [vocabulary, *ids.tolist(), *_tokens(events)]
    assert len(logprobs) == len(tokens) - 1 == length + 12
    logits = exact(tokens[:-1])
    for index, (row, token, one) in enumerate(zip(logits, tokens[1:], logprobs, strict=True)):
        expected = plain_sampler.logprobs(row.tolist(), token, 2 if index < length else 4)
        assert one.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert one.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)
        assert len(one.top_ids) == len(expected.top_ids)
        assert [row[t] for t in one.top_ids] == pytest.approx(
            [row[t] for t in expected.top_ids], abs=1e-4
        )


async def test_logprobs_come_only_on_request(text: Bundle, start: Start) -> None:
    model = start(text, slots=3)
    asked = [None, 0, None, 3, 20]
    requests = [
        ask(b"p", max_tokens=5 + n, sampling=SamplingParameters(seed=n, logprobs=top))
        for n, top in enumerate(asked)
    ]
    streams = [model.submit(wanted) for wanted in requests]
    everything = await asyncio.gather(*[_read_together(model, [s]) for s in streams])
    for n, (top, (events,)) in enumerate(zip(asked, everything, strict=True)):
        assert not any(isinstance(event, PromptLogprobs) for event in events)
        logprobs = [one for event in events if isinstance(event, Delta) for one in event.logprobs]
        assert len(logprobs) == (0 if top is None else 5 + n)
        assert all(len(one.top_ids) == len(one.top_logprobs) == top for one in logprobs)


async def test_a_stop_token_that_is_not_sent_has_no_logprobs(text: Bundle, start: Start) -> None:
    model = start(text)
    script(model, b"ab\0".ljust(text.context))
    for include_stop, count in [(False, 2), (True, 3)]:
        wanted = ask(
            sampling=SamplingParameters(logprobs=1),
            stop_tokens=frozenset({0}),
            include_stop=include_stop,
        )
        (events,) = await _read_together(model, [model.submit(wanted)])
        logprobs = [one for event in events if isinstance(event, Delta) for one in event.logprobs]
        assert len(logprobs) == len(_tokens(events)) == count


async def test_a_prompt_that_breaks_the_model_ends_its_stream(text: Bundle, start: Start) -> None:
    model = start(text)
    prefill = model.engine.runtime.prefill

    def broken(*args: Any) -> Floats:
        logits = prefill(*args).copy()
        logits[-1, 3] = np.nan
        return logits

    model.engine.runtime.prefill = broken  # type: ignore[method-assign]
    outcome = await generate(model, ask(b"abc", prompt_logprobs=0))
    assert isinstance(outcome.ending, StepFailed)
    assert "position 2" in outcome.ending.message


# ---- where streams end


@pytest.mark.parametrize(
    ("fields", "tokens", "sent", "stop"),
    [
        ({"stop": ("two",)}, b"one two", "one two", "two"),
        ({"stop": ("e t", "ne")}, b"one", "one", "ne"),
        ({"stop_tokens": frozenset(b"w")}, b"one tw", "one tw", None),
        ({"end_tokens": frozenset({ord("w")})}, b"one t", "one t", None),
        (
            {"end_tokens": frozenset({ord("w")}), "stop_tokens": frozenset(b"w")},
            b"one t",
            "one t",
            None,
        ),
    ],
)
async def test_include_stop_sends_the_stop_string_or_token(
    text: Bundle,
    start: Start,
    fields: dict[str, Any],
    tokens: bytes,
    sent: str,
    stop: str | None,
) -> None:
    model = start(text)
    script(model, b"one two three".ljust(text.context))
    outcome = await generate(model, ask(max_tokens=10, include_stop=True, **fields))
    assert (bytes(outcome.tokens), outcome.text) == (tokens, sent)
    assert isinstance(outcome.ending, Finish)
    assert outcome.ending.stop == stop


@pytest.mark.parametrize(("min_tokens", "count"), [(0, 0), (1, 1), (4, 4), (5, 5), (8, 8)])
async def test_no_stop_before_min_tokens(
    text: Bundle, start: Start, min_tokens: int, count: int
) -> None:
    """The model prefers the end token: before `min_tokens` its second choice is drawn."""
    model = start(text)

    def end(logits: Floats, positions: Ints) -> Floats:
        logits = np.zeros_like(logits)
        logits[:, [0, 7, ord("x")]] = [30, 20, 10]
        return logits

    change_logits(model, end)
    processors = LogitsProcessors(min_tokens=min_tokens, withheld=(0, 7))
    wanted = ask(
        max_tokens=8,
        sampling=SamplingParameters(temperature=0, processors=processors),
        min_tokens=min_tokens,
        end_tokens=frozenset({0}),
        stop_tokens=frozenset({7}),
    )
    outcome = await generate(model, wanted)
    assert outcome.text == "x" * count
    assert isinstance(outcome.ending, Finish)
    expected = FinishReason.MAX_TOKENS if count == 8 else FinishReason.END
    assert outcome.ending.reason == expected


async def test_processors_that_leave_no_token_end_their_stream_and_no_other(
    text: Bundle, start: Start
) -> None:
    model = start(text)
    processors = LogitsProcessors(allowed=(65, 66), bad_words=((65, 65), (66,)))
    wanted = ask(b"prompt", sampling=SamplingParameters(seed=3, processors=processors))
    beside = asyncio.create_task(generate(model, ask(max_tokens=20)))
    outcome = await generate(model, wanted)
    assert outcome.tokens == (65,)
    assert isinstance(outcome.ending, InvalidRequest)
    assert "bad_words" in outcome.ending.message
    assert "position 7" in outcome.ending.message
    assert len((await beside).tokens) == 20


# ---- how much is sent at once


@pytest.mark.parametrize(("interval", "count"), [(1, 20), (4, 21), (8, 20), (30, 20), (5, 1)])
async def test_events_hold_at_least_an_interval(
    text: Bundle, start: Start, interval: int, count: int
) -> None:
    model = start(text, stream_buffer=30)
    expected = await generate(model, ask(max_tokens=count))
    (events,) = await _read_together(
        model, [model.submit(ask(max_tokens=count, stream_interval=interval))]
    )
    assert tuple(_tokens(events)) == expected.tokens
    *deltas, ending = events
    assert isinstance(ending, Finish)
    assert all(len(delta.tokens) >= interval for delta in deltas[1:-1])
    assert "".join(delta.text for delta in deltas) == expected.text


async def test_first_and_last_tokens_are_never_held_back(text: Bundle, start: Start) -> None:
    model = start(text, slots=1)
    with Gate(model) as gate:
        stream = model.submit(ask(max_tokens=7, stream_interval=4))
        events = model.events(stream)
        await gate.held("step")
        await gate.let_one("step")
        sizes = [len((await asyncio.wait_for(anext(events), LIMIT_S)).tokens)]
        for _ in range(3):
            await gate.let_one("step")
        await asyncio.sleep(0.05)
        # Three tokens wait for a fourth.
        assert stream.subscriber.members[0].take() is None
        await gate.let_one("step")
        sizes.append(len((await asyncio.wait_for(anext(events), LIMIT_S)).tokens))
        gate.let(2)
        sizes.append(len((await asyncio.wait_for(anext(events), LIMIT_S)).tokens))
        assert isinstance(await anext(events), Finish)
    assert sizes == [1, 4, 2]


async def test_an_interval_as_large_as_the_buffer_never_gets_stuck(
    text: Bundle, start: Start
) -> None:
    model = start(text, slots=1, stream_buffer=5)
    wanted = ask(max_tokens=33, stream_interval=5)
    assert len((await generate(model, wanted)).tokens) == 33

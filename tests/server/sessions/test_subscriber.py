from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator

import pytest

from server.checkpoint import Finish, FinishReason, TokenLogprobs
from server.engine.restore import ResumeCursor
from server.engine.updates import Backlog, StreamUpdate
from server.request import Request, prompt_of
from server.sessions.subscriber import Deliveries, Delta, Event, PromptLogprobs, Subscriber, events

LIMIT_S = 10
ENDING = Finish(FinishReason.END, None, 1, 0, 0, 0, 0)


async def _subscriber(cursor: ResumeCursor | None = None, **fields: object) -> Subscriber:
    prompt = prompt_of(256, [7, 8], "B")
    request = Request(prompt, **{"max_tokens": 50, **fields})  # type: ignore[arg-type]
    loop, cursor = asyncio.get_running_loop(), cursor or ResumeCursor()
    return Subscriber(request, loop, Deliveries(), cursor=cursor)


async def _events(subscriber: Subscriber) -> AsyncIterator[Event]:
    async for _, event in events([subscriber]):
        yield event


async def test_an_event_has_all_that_is_in_the_buffer() -> None:
    subscriber = await _subscriber()
    for _ in range(3):
        subscriber.put(StreamUpdate(0))  # counted, but not delivered yet
    subscriber.deliver(StreamUpdate(65, "A"))
    subscriber.deliver(StreamUpdate(0xC3))
    events = _events(subscriber)
    assert await anext(events) == Delta(2, (65, 0xC3), "A")
    assert subscriber.unread == 1
    subscriber.deliver(StreamUpdate(0xA9, "é"))
    subscriber.deliver(StreamUpdate(ending=ENDING))
    assert [event async for event in events] == [Delta(4, (0xA9,), "é"), ENDING]
    assert subscriber.unread == 0


@pytest.mark.parametrize(
    ("token", "text", "expected"),
    [
        (66, "B", [Delta(3, (66,), "B")]),
        (None, "held back", [Delta(3, (), "held back")]),
        (None, "", []),
    ],
)
async def test_nothing_that_comes_with_the_ending_is_lost(
    token: int | None, text: str, expected: list[Event]
) -> None:
    """Even if it comes while the reader handles an earlier event."""
    subscriber = await _subscriber()
    subscriber.deliver(StreamUpdate(65, "A"))
    events = _events(subscriber)
    assert await anext(events) == Delta(2, (65,), "A")
    subscriber.deliver(StreamUpdate(token, text))
    subscriber.deliver(StreamUpdate(ending=ENDING))
    async with asyncio.timeout(LIMIT_S):
        assert [event async for event in events] == [*expected, ENDING]


async def test_tokens_wait_for_an_interval_but_not_the_first_nor_the_last() -> None:
    subscriber = await _subscriber(stream_interval=3)
    taken: list[Event | None] = []
    for token in range(65, 72):
        subscriber.deliver(StreamUpdate(token, chr(token)))
        taken.append(subscriber.take())
    subscriber.deliver(StreamUpdate(72, "H"))
    subscriber.deliver(StreamUpdate(ending=ENDING))
    taken += [subscriber.take(), subscriber.take(), subscriber.take()]
    assert taken == [
        Delta(2, (65,), "A"),
        None,
        None,
        Delta(3, (66, 67, 68), "BCD"),
        None,
        None,
        Delta(6, (69, 70, 71), "EFG"),
        Delta(9, (72,), "H"),
        ENDING,
        None,
    ]


async def test_a_reader_is_not_woken_before_an_event_is_due() -> None:
    subscriber = await _subscriber(stream_interval=2)
    subscriber.deliver(StreamUpdate(65))
    await asyncio.wait_for(subscriber.arrival(), LIMIT_S)
    assert subscriber.take() == Delta(2, (65,), "")
    subscriber.deliver(StreamUpdate(66))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(subscriber.arrival(), 0.01)


async def test_prompt_logprobs_come_first_in_events_of_bounded_size() -> None:
    subscriber = await _subscriber()
    logprobs = [TokenLogprobs(-float(n), (), ()) for n in range(300)]
    subscriber.deliver(StreamUpdate(prompt=logprobs[:70]))
    subscriber.deliver(StreamUpdate(prompt=logprobs[70:]))
    subscriber.deliver(StreamUpdate(65, "A", logprobs[0]))
    events = [event for event in iter(subscriber.take, None)]
    assert events.pop() == Delta(2, (65,), "A", (logprobs[0],))
    assert all(isinstance(event, PromptLogprobs) for event in events)
    assert [event.first_position for event in events] == [0, 128, 256]
    assert [one for event in events for one in event.logprobs] == logprobs


@pytest.mark.parametrize("interval", [1, 200, 300])
async def test_log_probabilities_come_in_parts_and_the_rest_at_once(interval: int) -> None:
    """Whatever the interval: what is left of an event that was too large is due."""
    subscriber = await _subscriber(stream_interval=interval)
    subscriber.deliver(StreamUpdate(65, "A", TokenLogprobs(0.0, (), ())))
    assert subscriber.take() == Delta(2, (65,), "A", (TokenLogprobs(0.0, (), ()),))
    logprobs = [TokenLogprobs(-float(n), (), ()) for n in range(300)]
    for one in logprobs:
        subscriber.deliver(StreamUpdate(66, "B", one))
    events = [event for event in iter(subscriber.take, None) if isinstance(event, Delta)]
    assert [event.first_position for event in events] == [3, 131, 259]
    assert [one for event in events for one in event.logprobs] == logprobs
    assert "".join(event.text for event in events) == "B" * 300


async def test_subscribers_of_one_request_take_turns() -> None:
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    request = Request(prompt_of(256, [], "B"), max_tokens=50)
    one, other = (Subscriber(request, loop, arrived) for _ in range(2))
    for token in (1, 2):
        one.deliver(StreamUpdate(token))
        other.deliver(StreamUpdate(10 + token))
    seen: list[tuple[bool, Event]] = []
    async with asyncio.timeout(LIMIT_S):
        async for subscriber, event in events([one, other]):
            seen.append((subscriber is one, event))
            if event == Delta(0, (1, 2), ""):  # more for the first, while the second waits
                one.deliver(StreamUpdate(3, ending=ENDING))
            if event == Delta(0, (11, 12), ""):
                other.deliver(StreamUpdate(ending=ENDING))
    assert seen == [
        (True, Delta(0, (1, 2), "")),
        (False, Delta(0, (11, 12), "")),
        (True, Delta(2, (3,), "")),
        (False, ENDING),
        (True, ENDING),
    ]


@pytest.mark.parametrize("behind", range(7))
@pytest.mark.parametrize("split", range(7))
async def test_received_tokens_do_not_come_again(behind: int, split: int) -> None:
    """The reader may have fewer tokens than the backlog, or more."""
    content, logprobs = "abcdef", [TokenLogprobs(-float(n), (), ()) for n in range(6)]
    cursor = ResumeCursor(tokens=behind, characters=behind)
    subscriber = await _subscriber(cursor)
    backlog = Backlog(array("B", content[:split].encode()), content[:split], logprobs[:split], ())
    subscriber.published = max(0, split - behind)
    subscriber.deliver(StreamUpdate(backlog=backlog))
    for at in range(split, 6):
        subscriber.published += 1
        subscriber.deliver(StreamUpdate(ord(content[at]), content[at], logprobs[at]))
    subscriber.deliver(StreamUpdate(ending=ENDING))
    rest = content[behind:]
    delta = Delta(2 + behind, tuple(rest.encode()), rest, tuple(logprobs[behind:]))
    got = [event async for event in _events(subscriber)]
    assert got == ([delta] if rest else []) + [ENDING]
    assert subscriber.unread == 0


async def test_an_output_whose_ending_was_received_sends_nothing() -> None:
    subscriber = await _subscriber(ResumeCursor(ended=True))
    subscriber.deliver(StreamUpdate(65, "A"))
    subscriber.deliver(StreamUpdate(ending=ENDING))
    assert subscriber.take() is None
    assert subscriber.is_over


@pytest.mark.parametrize("received", [0, 2, 5])
async def test_logprobs_of_the_prompt_come_once(received: int) -> None:
    logprobs = [TokenLogprobs(-float(n), (), ()) for n in range(5)]
    subscriber = await _subscriber(ResumeCursor(prompt_logprobs=received))
    subscriber.deliver(StreamUpdate(backlog=Backlog(array("B"), "", (), logprobs[:3])))
    subscriber.deliver(StreamUpdate(prompt=logprobs[3:]))
    event = subscriber.take()
    if received == 5:
        assert event is None
    else:
        assert event == PromptLogprobs(received, tuple(logprobs[received:]))

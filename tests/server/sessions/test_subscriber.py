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


async def _reader(received: ResumeCursor | None = None, **fields: object) -> Subscriber:
    prompt = prompt_of(256, [7, 8], "B")
    request = Request(prompt, **{"max_tokens": 50, **fields})  # type: ignore[arg-type]
    loop, cursor = asyncio.get_running_loop(), received or ResumeCursor()
    return Subscriber(request, loop, Deliveries(), cursor=cursor)


async def _events(reader: Subscriber) -> AsyncIterator[Event]:
    async for _, event in events([reader]):
        yield event


async def test_a_reader_takes_all_there_is_at_once() -> None:
    reader = await _reader()
    for _ in range(3):
        reader.put(StreamUpdate(0))  # counted, and not delivered yet
    reader.deliver(StreamUpdate(65, "A"))
    reader.deliver(StreamUpdate(0xC3))
    events = _events(reader)
    assert await anext(events) == Delta(2, (65, 0xC3), "A")
    assert reader.unread == 1
    reader.deliver(StreamUpdate(0xA9, "é"))
    reader.deliver(StreamUpdate(ending=ENDING))
    assert [event async for event in events] == [Delta(4, (0xA9,), "é"), ENDING]
    assert reader.unread == 0


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
    """Even when it comes while the reader is busy with what was there before."""
    reader = await _reader()
    reader.deliver(StreamUpdate(65, "A"))
    events = _events(reader)
    assert await anext(events) == Delta(2, (65,), "A")
    reader.deliver(StreamUpdate(token, text))
    reader.deliver(StreamUpdate(ending=ENDING))
    async with asyncio.timeout(LIMIT_S):
        assert [event async for event in events] == [*expected, ENDING]


async def test_tokens_wait_for_an_interval_but_not_the_first_nor_the_last() -> None:
    reader = await _reader(stream_interval=3)
    taken: list[Event | None] = []
    for token in range(65, 72):
        reader.deliver(StreamUpdate(token, chr(token)))
        taken.append(reader.take())
    reader.deliver(StreamUpdate(72, "H"))
    reader.deliver(StreamUpdate(ending=ENDING))
    taken += [reader.take(), reader.take(), reader.take()]
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


async def test_a_reader_is_not_woken_for_what_it_may_not_take() -> None:
    reader = await _reader(stream_interval=2)
    reader.deliver(StreamUpdate(65))
    await asyncio.wait_for(reader.arrival(), LIMIT_S)
    assert reader.take() == Delta(2, (65,), "")
    reader.deliver(StreamUpdate(66))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.arrival(), 0.01)


async def test_the_prompt_is_told_first_and_in_pieces_of_bounded_size() -> None:
    reader = await _reader()
    told = [TokenLogprobs(-float(n), (), ()) for n in range(1500)]
    reader.deliver(StreamUpdate(prompt=told[:700]))
    reader.deliver(StreamUpdate(prompt=told[700:]))
    reader.deliver(StreamUpdate(65, "A", told[0]))
    events = [event for event in iter(reader.take, None)]
    assert events.pop() == Delta(2, (65,), "A", (told[0],))
    assert all(isinstance(event, PromptLogprobs) for event in events)
    assert [event.first_position for event in events] == [0, 512, 1024]
    assert [one for event in events for one in event.logprobs] == told


async def test_readers_that_share_their_arrivals_take_turns() -> None:
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    request = Request(prompt_of(256, [], "B"), max_tokens=50)
    one, other = (Subscriber(request, loop, arrived) for _ in range(2))
    for token in (1, 2):
        one.deliver(StreamUpdate(token))
        other.deliver(StreamUpdate(10 + token))
    seen: list[tuple[bool, Event]] = []
    async with asyncio.timeout(LIMIT_S):
        async for reader, event in events([one, other]):
            seen.append((reader is one, event))
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
async def test_what_was_received_comes_once(behind: int, split: int) -> None:
    """Whether the reader lacks some of what was said before it came, or has more than that."""
    content, told = "abcdef", [TokenLogprobs(-float(n), (), ()) for n in range(6)]
    received = ResumeCursor(tokens=behind, characters=behind)
    reader = await _reader(received)
    backlog = Backlog(array("B", content[:split].encode()), content[:split], told[:split], ())
    reader.published = max(0, split - behind)
    reader.deliver(StreamUpdate(backlog=backlog))
    for at in range(split, 6):
        reader.published += 1
        reader.deliver(StreamUpdate(ord(content[at]), content[at], told[at]))
    reader.deliver(StreamUpdate(ending=ENDING))
    rest = content[behind:]
    delta = Delta(2 + behind, tuple(rest.encode()), rest, tuple(told[behind:]))
    got = [event async for event in _events(reader)]
    assert got == ([delta] if rest else []) + [ENDING]
    assert reader.unread == 0


async def test_an_output_that_has_ended_for_its_reader_says_nothing() -> None:
    reader = await _reader(ResumeCursor(ended=True))
    reader.deliver(StreamUpdate(65, "A"))
    reader.deliver(StreamUpdate(ending=ENDING))
    assert reader.take() is None
    assert reader.is_over


@pytest.mark.parametrize("had", [0, 2, 5])
async def test_logprobs_of_the_prompt_come_once(had: int) -> None:
    told = [TokenLogprobs(-float(n), (), ()) for n in range(5)]
    reader = await _reader(ResumeCursor(prompt_logprobs=had))
    reader.deliver(StreamUpdate(backlog=Backlog(array("B"), "", (), told[:3])))
    reader.deliver(StreamUpdate(prompt=told[3:]))
    event = reader.take()
    if had == 5:
        assert event is None
    else:
        assert event == PromptLogprobs(had, tuple(told[had:]))

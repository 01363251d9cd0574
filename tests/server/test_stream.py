from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from server.logprobs import TokenLogprobs
from server.stream import (
    Delta,
    Event,
    Finish,
    FinishReason,
    Piece,
    PromptLogprobs,
    Request,
    Stream,
    events,
)

LIMIT_S = 10


async def _stream(**fields: object) -> Stream:
    request = Request(np.array([256, 7, 8]), **{"max_tokens": 50, **fields})  # type: ignore[arg-type]
    return Stream("s", request, asyncio.get_running_loop())


async def _events(stream: Stream) -> AsyncIterator[Event]:
    async for _, event in events([stream]):
        yield event


def _finish(stream: Stream) -> Finish:
    return stream.finish(FinishReason.END, 0, stream.accepted_at)


@pytest.mark.parametrize(
    ("fields", "tokens", "reason", "text"),
    [
        ({}, b"abc", None, "abc"),
        ({"max_tokens": 3}, b"abc", FinishReason.MAX_TOKENS, "abc"),
        ({"end_token": 0}, b"ab\0", FinishReason.END, "ab"),
        ({"stop_tokens": frozenset(b"cd")}, b"abc", FinishReason.STOP, "ab"),
        ({"stop": ("bc",)}, b"abc", FinishReason.STOP, "a"),
        # What happens with the last token that is allowed has other reasons, too.
        ({"max_tokens": 3, "stop": ("bc",)}, b"abc", FinishReason.STOP, "a"),
        ({"max_tokens": 3, "end_token": 99}, b"abc", FinishReason.END, "ab"),
        ({"end_token": 99, "stop_tokens": frozenset(b"c")}, b"abc", FinishReason.STOP, "ab"),
        (
            {"end_token": 99, "stop_tokens": frozenset(b"c"), "include_stop": True},
            b"abc",
            FinishReason.STOP,
            "ab",  # the end token is never sent
        ),
        (
            {"stop_tokens": frozenset(b"c"), "include_stop": True},
            b"abc",
            FinishReason.STOP,
            "abc",
        ),
        ({"end_token": 99, "include_stop": True}, b"abc", FinishReason.END, "ab"),
        ({"stop": ("bc",), "include_stop": True}, b"abc", FinishReason.STOP, "abc"),
        ({"stop": ("ab",), "min_tokens": 1}, b"ab", FinishReason.STOP, ""),
        ({"stop": ("ab", "c"), "min_tokens": 2}, b"abc", FinishReason.STOP, "ab"),
        ({"max_tokens": 3, "complete_at": 5}, b"abc", FinishReason.END, ""),
        ({"max_tokens": 3, "complete_at": 6}, b"abc", FinishReason.MAX_TOKENS, ""),
    ],
)
async def test_why_a_stream_ends(
    fields: dict[str, object], tokens: bytes, reason: FinishReason | None, text: str
) -> None:
    stream = await _stream(**fields)
    taken = [stream.accept_token(token, 5.0) for token in tokens]
    assert [why for _, why in taken] == [*[None] * (len(tokens) - 1), reason]
    assert "".join(piece for piece, _ in taken) == text
    assert (stream.generated, stream.last_token) == (len(tokens), tokens[-1])


async def test_the_first_step_pushes_the_last_token_of_the_prompt() -> None:
    stream = await _stream()
    assert stream.unpushed(0).tolist() == [256, 7]
    assert stream.unpushed(1).tolist() == [7]
    assert stream.unpushed(2).tolist() == []
    assert stream.last_token == 8


async def test_times_count_from_acceptance() -> None:
    stream = await _stream()
    at = stream.accepted_at
    early = stream.finish(FinishReason.TIME_LIMIT, 0, at + 9)
    assert (early.queue_s, early.first_token_s, early.total_s) == (9, 9, 9)
    stream.started_at = at + 1
    stream.accept_token(65, at + 3)
    stream.accept_token(66, at + 4)
    late = stream.finish(FinishReason.END, 77, at + 9)
    assert (late.queue_s, late.first_token_s, late.total_s) == (1, 3, 9)
    assert (late.generated, late.state_bytes, late.stop) == (2, 77, None)


async def test_a_reader_takes_all_there_is_at_once() -> None:
    stream = await _stream()
    stream.published = 3
    stream.deliver(Piece(65, "A"))
    stream.deliver(Piece(0xC3))
    events = _events(stream)
    assert await anext(events) == Delta(2, (65, 0xC3), "A")
    assert stream.unread == 1
    stream.deliver(Piece(0xA9, "é"))
    ending = _finish(stream)
    stream.deliver(Piece(ending=ending))
    assert [event async for event in events] == [Delta(4, (0xA9,), "é"), ending]
    assert stream.unread == 0


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
    stream = await _stream()
    stream.deliver(Piece(65, "A"))
    events = _events(stream)
    assert await anext(events) == Delta(2, (65,), "A")
    stream.deliver(Piece(token, text))
    ending = _finish(stream)
    stream.deliver(Piece(ending=ending))
    async with asyncio.timeout(LIMIT_S):
        assert [event async for event in events] == [*expected, ending]


async def test_tokens_wait_for_an_interval_but_not_the_first_nor_the_last() -> None:
    stream = await _stream(stream_interval=3)
    taken: list[Event | None] = []
    for token in range(65, 72):
        stream.deliver(Piece(token, chr(token)))
        taken.append(stream.take())
    ending = _finish(stream)
    stream.deliver(Piece(72, "H"))
    stream.deliver(Piece(ending=ending))
    taken += [stream.take(), stream.take(), stream.take()]
    assert taken == [
        Delta(2, (65,), "A"),
        None,
        None,
        Delta(3, (66, 67, 68), "BCD"),
        None,
        None,
        Delta(6, (69, 70, 71), "EFG"),
        Delta(9, (72,), "H"),
        ending,
        None,
    ]


async def test_a_reader_is_not_woken_for_what_it_may_not_take() -> None:
    stream = await _stream(stream_interval=2)
    stream.deliver(Piece(65))
    await asyncio.wait_for(stream.arrival(), LIMIT_S)
    assert stream.take() == Delta(2, (65,), "")
    stream.deliver(Piece(66))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.arrival(), 0.01)


async def test_the_prompt_is_told_first_and_in_pieces_of_bounded_size() -> None:
    stream = await _stream()
    told = [TokenLogprobs(-float(n), (), ()) for n in range(1500)]
    stream.deliver(Piece(prompt=told[:700]))
    stream.deliver(Piece(prompt=told[700:]))
    stream.deliver(Piece(65, "A", told[0]))
    events = [event for event in iter(stream.take, None)]
    assert events.pop() == Delta(2, (65,), "A", (told[0],))
    assert all(isinstance(event, PromptLogprobs) for event in events)
    assert [event.first_position for event in events] == [0, 512, 1024]
    assert [one for event in events for one in event.logprobs] == told


async def test_streams_that_share_their_arrivals_take_turns() -> None:
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    request = Request(np.array([256]), max_tokens=50)
    one, other = (Stream("s", request, loop, arrived) for _ in range(2))
    ending = _finish(one)
    for token in (1, 2):
        one.deliver(Piece(token))
        other.deliver(Piece(10 + token))
    seen: list[tuple[bool, Event]] = []
    async with asyncio.timeout(LIMIT_S):
        async for stream, event in events([one, other]):
            seen.append((stream is one, event))
            if event == Delta(0, (1, 2), ""):  # more for the first, while the second waits
                one.deliver(Piece(3, ending=ending))
            if event == Delta(0, (11, 12), ""):
                other.deliver(Piece(ending=ending))
    assert seen == [
        (True, Delta(0, (1, 2), "")),
        (False, Delta(0, (11, 12), "")),
        (True, Delta(2, (3,), "")),
        (False, ending),
        (True, ending),
    ]

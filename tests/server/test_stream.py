from __future__ import annotations

import asyncio

import numpy as np
import pytest

from server.stream import Delta, Event, Finish, FinishReason, Request, Stream

LIMIT_S = 10


async def _stream(**fields: object) -> Stream:
    request = Request(np.array([256, 7, 8]), **{"max_tokens": 50, **fields})  # type: ignore[arg-type]
    return Stream("s", request, asyncio.get_running_loop())


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
        ({"max_tokens": 3, "complete_at": 5}, b"abc", FinishReason.END, ""),
        ({"max_tokens": 3, "complete_at": 6}, b"abc", FinishReason.MAX_TOKENS, ""),
    ],
)
async def test_why_a_stream_ends(
    fields: dict[str, object], tokens: bytes, reason: FinishReason | None, text: str
) -> None:
    stream = await _stream(**fields)
    taken = [stream.accept_token(token, 5.0) for token in tokens]
    assert [why for _, why in taken] == [None, None, reason]
    assert "".join(piece for piece, _ in taken) == text
    assert (stream.generated, stream.last_token) == (3, tokens[-1])


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
    stream.deliver(65, "A", None)
    stream.deliver(0xC3, "", None)
    events = stream.events()
    assert await anext(events) == Delta(2, (65, 0xC3), "A")
    assert stream.unread == 1
    stream.deliver(0xA9, "é", None)
    ending = _finish(stream)
    stream.deliver(None, "", ending)
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
    stream.deliver(65, "A", None)
    events = stream.events()
    assert await anext(events) == Delta(2, (65,), "A")
    stream.deliver(token, text, None)
    ending = _finish(stream)
    stream.deliver(None, "", ending)
    async with asyncio.timeout(LIMIT_S):
        assert [event async for event in events] == [*expected, ending]

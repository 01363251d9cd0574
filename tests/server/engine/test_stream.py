from __future__ import annotations

import asyncio
from array import array

import pytest

from concertina.codecs.token_text import TokenText
from server.checkpoint import Checkpoint, Finish, FinishReason, SavedState
from server.engine.restore import BEGINNING, ResumeCursor, restore
from server.engine.stream import Stream
from server.request import Lease, Request, prompt_of
from server.sessions.subscriber import Deliveries, Subscriber
from tests.server.engines import BYTES

START = 256
PIXELS = TokenText((b"",) * 256)


async def _stream(
    checkpoint: Checkpoint | None = None, cursor: ResumeCursor = BEGINNING, **fields: object
) -> Stream:
    prompt = prompt_of(START, [7, 8], "B")
    request = Request(prompt, **{"max_tokens": 50, **fields})  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    subscriber = Subscriber(request, loop, Deliveries(), cursor=cursor)
    lease = Lease("s", (request,), keep_s=60.0)
    text = BYTES if request.complete_at is None else PIXELS
    checkpoint = checkpoint or Checkpoint(array("B"))
    return restore(lease, request, subscriber, checkpoint, cursor, text)


@pytest.mark.parametrize(
    ("fields", "tokens", "reason", "text"),
    [
        ({}, b"abc", None, "abc"),
        ({"max_tokens": 3}, b"abc", FinishReason.MAX_TOKENS, "abc"),
        ({"end_tokens": frozenset({0})}, b"ab\0", FinishReason.END, "ab"),
        ({"stop_tokens": frozenset(b"cd")}, b"abc", FinishReason.STOP, "ab"),
        ({"stop": ("bc",)}, b"abc", FinishReason.STOP, "a"),
        # The last token of `max_tokens` may end the stream for another reason.
        ({"max_tokens": 3, "stop": ("bc",)}, b"abc", FinishReason.STOP, "a"),
        ({"max_tokens": 3, "end_tokens": frozenset({99})}, b"abc", FinishReason.END, "ab"),
        (
            {"end_tokens": frozenset({99}), "stop_tokens": frozenset(b"c")},
            b"abc",
            FinishReason.STOP,
            "ab",
        ),
        (
            {"end_tokens": frozenset({99}), "stop_tokens": frozenset(b"c"), "include_stop": True},
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
        ({"end_tokens": frozenset({99}), "include_stop": True}, b"abc", FinishReason.END, "ab"),
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
    assert stream.request.prompt.inputs().tolist() == [256, 7]
    assert stream.request.prompt.inputs(1).tolist() == [7]
    assert stream.request.prompt.inputs(2).tolist() == []
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


def _checkpoint(tokens: bytes, pushed: int, **fields: object) -> Checkpoint:
    """A checkpoint with `tokens` generated and `pushed` tokens in the state."""
    return Checkpoint(array("B", tokens), SavedState({}, pushed), **fields)  # type: ignore[arg-type]


async def test_a_restored_stream_follows_from_its_tokens() -> None:
    lived = await _stream(stop=("de!",))
    for token in "abcdé".encode()[:-1]:
        lived.accept_token(token, 1.0)
    revived = await _stream(_checkpoint(bytes(lived.history), pushed=2 + 5), stop=("de!",))
    assert (
        (revived.generated, revived.last_token) == (lived.generated, lived.last_token) == (5, 0xC3)
    )
    assert revived.history == lived.history
    assert not revived.replay_tokens
    for token in ("é".encode()[-1], *b"de!"):
        assert revived.accept_token(token, 2.0) == lived.accept_token(token, 2.0)
    assert revived.detokenizer.matched == "de!"


@pytest.mark.parametrize("pushed", [0, 1, 2, 3, 4, 5])
async def test_tokens_that_are_not_in_the_state_are_replayed(pushed: int) -> None:
    saved = SavedState({}, pushed) if pushed else None
    stream = await _stream(Checkpoint(array("B", b"abc"), saved))
    seen = max(0, pushed - 2)
    assert bytes(stream.history) == b"abc"[:seen]
    assert bytes(stream.replay_tokens) == b"abc"[seen:]
    assert stream.last_token == (b"abc"[seen - 1] if seen else 8)
    assert stream.to_prefill == max(0, 2 - pushed)


@pytest.mark.parametrize(
    ("cursor", "replayed"),
    [
        (ResumeCursor(tokens=6, last_ids=tuple(b"cdef")), b"cdef"),
        (ResumeCursor(tokens=6, last_ids=tuple(b"abcdef")), b"cdef"),
        (ResumeCursor(tokens=6, last_ids=tuple(b"ef")), b""),  # the tokens between are unknown
        (ResumeCursor(tokens=2, last_ids=tuple(b"ab")), b""),
        (ResumeCursor(tokens=5), b""),
    ],
)
async def test_the_cursor_adds_tokens_after_the_snapshot(
    cursor: ResumeCursor, replayed: bytes
) -> None:
    stream = await _stream(_checkpoint(b"ab", pushed=4), cursor)
    assert bytes(stream.replay_tokens) == replayed


async def test_missing_logprobs_of_the_prompt_are_computed_again() -> None:
    cursor = ResumeCursor(prompt_logprobs=1)
    stream = await _stream(_checkpoint(b"ab", pushed=4), cursor, prompt_logprobs=0)
    assert stream.saved is None
    assert stream.to_prefill == 2
    assert bytes(stream.replay_tokens) == b"ab"
    complete = await _stream(
        _checkpoint(b"ab", pushed=4), ResumeCursor(prompt_logprobs=2), prompt_logprobs=0
    )
    assert complete.saved is not None


@pytest.mark.parametrize(
    ("fields", "tokens", "reason", "stop", "text"),
    [
        ({}, "aé".encode()[:-1], FinishReason.MAX_TOKENS, None, "a\ufffd"),
        ({}, "aé".encode()[:-1], FinishReason.PAUSED, None, "a"),
        ({"stop": ("bc",)}, b"abc", FinishReason.STOP, "bc", "a"),
        ({"stop": ("bc",), "include_stop": True}, b"abc", FinishReason.STOP, "bc", "abc"),
        ({"stop": ("bcd",)}, b"abc", FinishReason.MAX_TOKENS, None, "abc"),
        ({"stop": ("bcd",)}, b"abc", FinishReason.PAUSED, None, "a"),
        # The last byte completes two characters: the stop string and one that follows it.
        ({"stop": ("\ufffd",)}, b"a\xc3b", FinishReason.STOP, "\ufffd", "a"),
        (
            {"stop": ("\ufffd",), "include_stop": True},
            b"a\xc3b",
            FinishReason.STOP,
            "\ufffd",
            "a\ufffd",
        ),
    ],
)
async def test_the_backlog_of_an_ended_stream_is_its_whole_output(
    fields: dict[str, object], tokens: bytes, reason: FinishReason, stop: str | None, text: str
) -> None:
    finish = Finish(reason, stop, len(tokens), 0, 0, 0, 0)
    stream = await _stream(_checkpoint(tokens, 2 + len(tokens), finish=finish), **fields)
    assert stream.ended
    assert stream.backlog is not None
    assert (bytes(stream.backlog.tokens), stream.backlog.text) == (tokens, text)


@pytest.mark.parametrize(
    ("stop", "following", "sent"),
    [
        ((), b"d", "d"),
        (("abc",), b"d", "d"),  # "ab" is held back, but was sent before
        (("abc",), b"c", ""),
        (("abcd",), b"ce", "ce"),
    ],
)
async def test_text_that_was_sent_before_a_pause_is_not_sent_again(
    stop: tuple[str, ...], following: bytes, sent: str
) -> None:
    checkpoint = _checkpoint(b"xab", pushed=5, base_tokens=3, base_characters=3)
    stream = await _stream(checkpoint, stop=stop)
    text = "".join(stream.accept_token(token, 1.0)[0] for token in following)
    assert text == sent
    assert stream.backlog is not None
    if stream.detokenizer.matched is None:
        assert stream.backlog.text == sent

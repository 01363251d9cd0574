"""Streams that go on: from a checkpoint, and from what their reader says to have."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.checkpoint import Checkpoint
from server.engine.interfaces import Subscriber
from server.engine.stream import Stream
from server.request import Lease, Request


@dataclass(frozen=True)
class ResumeCursor:
    """What a reader has of an output already."""

    tokens: int = 0
    characters: int = 0
    prompt_logprobs: int = 0
    ended: bool = False
    last_ids: tuple[int, ...] = ()
    """The last of the tokens, oldest first; those before are not known."""


BEGINNING = ResumeCursor()


def restore(
    lease: Lease,
    request: Request,
    subscriber: Subscriber,
    checkpoint: Checkpoint,
    cursor: ResumeCursor = BEGINNING,
) -> Stream:
    """A stream that goes on behind `checkpoint`, for a reader who is at `cursor`.

    Tokens that are known and that the state has not seen are drawn again, with their outcome given.
    """
    stream = Stream(lease, request, subscriber, checkpoint.generated.typecode)
    wanted = len(request.prompt) if request.prompt_logprobs is not None else 0
    if cursor.prompt_logprobs < wanted and not checkpoint.is_paused:
        # The prompt's log-probabilities are not stored: it has to be pushed again.
        checkpoint = replace(checkpoint, saved=None, finish=None)
    # A stream whose end its reader has and we have not runs to it again, for the next reader.
    stream.ended, stream.ending = checkpoint.finish is not None, checkpoint.finish
    stream.base_tokens = checkpoint.base_tokens
    stream.base_characters = checkpoint.base_characters
    stream.queue_s = checkpoint.queue_s
    if checkpoint.first_token_s is not None:
        stream.first_token_at = stream.accepted_at + checkpoint.first_token_s
    stream.saved = checkpoint.saved
    stream.snapshot_at = 0 if checkpoint.saved is None else checkpoint.saved.pushed
    seen = _seen(request, checkpoint)
    stream.history = checkpoint.generated[:seen]
    stream.logprobs = list(checkpoint.logprobs[:seen])
    stream.replay_tokens = deque(_known(checkpoint, seen, cursor))
    stream.generated = seen
    if seen:
        stream.last_token = stream.history[-1]
        if request.complete_at is None:
            stream.detokenizer.replay(bytes(stream.history.tolist()))
    return stream


def _seen(request: Request, checkpoint: Checkpoint) -> int:
    """How many of the generated tokens the state has seen, or was drawn by."""
    if checkpoint.finish is not None:
        return len(checkpoint.generated)
    pushed = 0 if checkpoint.saved is None else checkpoint.saved.pushed
    # The last token that a stream knows is pushed by the step that draws the next.
    return min(max(0, pushed - len(request.prompt)), len(checkpoint.generated))


def _known(checkpoint: Checkpoint, seen: int, cursor: ResumeCursor) -> Sequence[int]:
    """The tokens that come after the first `seen`, as far as anybody knows them."""
    known = checkpoint.generated[seen:].tolist()
    first = cursor.tokens + checkpoint.base_tokens - len(cursor.last_ids)
    at = seen + len(known)
    if first <= at < first + len(cursor.last_ids):
        known += cursor.last_ids[at - first :]
    return known

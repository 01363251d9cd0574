"""Restores a stream from its checkpoint and the resume cursor of its reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from concertina.codecs.token_text import TokenText
from server.checkpoint import Checkpoint
from server.engine.interfaces import Subscriber
from server.engine.stream import Stream
from server.request import Lease, Request


@dataclass(frozen=True)
class ResumeCursor:
    """How much of an output a reader has received.

    tokens, characters, prompt_logprobs: how many of each. ended: whether it has the ending.
    """

    tokens: int = 0
    characters: int = 0
    prompt_logprobs: int = 0
    ended: bool = False
    last_ids: tuple[int, ...] = ()
    """The last of the received tokens, oldest first; may be fewer than `tokens`."""


BEGINNING = ResumeCursor()


def restore(
    lease: Lease,
    request: Request,
    subscriber: Subscriber,
    checkpoint: Checkpoint,
    cursor: ResumeCursor,
    text: TokenText,
) -> Stream:
    """A stream that continues from `checkpoint`, for a reader who is at `cursor`.

    text: what its tokens stand for.

    Tokens that are known but not in the state become replay tokens: the model runs for each, but
    the token is not drawn again.
    """
    stream = Stream(lease, request, subscriber, checkpoint.generated.typecode, text)
    wanted = len(request.prompt) if request.prompt_logprobs is not None else 0
    if cursor.prompt_logprobs < wanted and not checkpoint.is_paused:
        # Log-probabilities of the prompt are not stored, so the prompt is pushed again.
        checkpoint = replace(checkpoint, saved=None, finish=None)
    # If the reader has the ending but the checkpoint does not, the stream runs to its end again.
    # Another reader may ask for it later.
    stream.ended, stream.ending = checkpoint.finish is not None, checkpoint.finish
    stream.base_tokens = checkpoint.base_tokens
    stream.base_characters = checkpoint.base_characters
    stream.queue_s = checkpoint.queue_s
    if checkpoint.first_token_s is not None:
        stream.first_token_at = stream.accepted_at + checkpoint.first_token_s
    stream.saved = checkpoint.saved
    stream.snapshot_at = 0 if checkpoint.saved is None else checkpoint.saved.pushed
    num_restored = _num_restored(request, checkpoint)
    stream.history = checkpoint.generated[:num_restored]
    stream.logprobs = list(checkpoint.logprobs[:num_restored])
    stream.replay_tokens = deque(_replay_tokens(checkpoint, num_restored, cursor))
    stream.generated = num_restored
    if num_restored:
        stream.last_token = stream.history[-1]
        sent = checkpoint.base_characters
        stream.detokenizer.replay(stream.history, sent=sent)
    return stream


def _num_restored(request: Request, checkpoint: Checkpoint) -> int:
    """Number of generated tokens that need no replay: the saved state covers them."""
    if checkpoint.finish is not None:
        return len(checkpoint.generated)
    pushed = 0 if checkpoint.saved is None else checkpoint.saved.pushed
    # The last restored token is not in the state: the next step pushes it.
    return min(max(0, pushed - len(request.prompt)), len(checkpoint.generated))


def _replay_tokens(checkpoint: Checkpoint, begin: int, cursor: ResumeCursor) -> Sequence[int]:
    """Generated tokens from index `begin` on: those of the checkpoint, then those of the reader."""
    tokens = checkpoint.generated[begin:].tolist()
    first = cursor.tokens + checkpoint.base_tokens - len(cursor.last_ids)
    at = begin + len(tokens)
    if first <= at < first + len(cursor.last_ids):
        tokens += cursor.last_ids[at - first :]
    return tokens

"""Updates of a stream from the engine to its subscriber, and how a stream ends."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.checkpoint import Finish, TokenLogprobs
from server.errors import RequestError


@dataclass(frozen=True)
class Scored:
    """The score of a prompt: bits (negative log2-probability) of each token."""

    bits: tuple[float, ...]


@dataclass(frozen=True)
class HandedOver:
    """This server stops serving the stream; another one can continue it."""


Ending = Finish | Scored | RequestError | HandedOver


class Backlog(NamedTuple):
    """The output of a stream before its subscriber attached.

    prompt: log-probabilities of the prompt tokens.
    """

    tokens: array[int]
    text: str
    logprobs: Sequence[TokenLogprobs]
    prompt: Sequence[TokenLogprobs]


class StreamUpdate(NamedTuple):
    """What one pass of the model adds to a stream.

    prompt: log-probabilities of prompt tokens. backlog: earlier output, for a new subscriber.
    """

    token: int | None = None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    prompt: Sequence[TokenLogprobs] = ()
    ending: Ending | None = None
    backlog: Backlog | None = None


def outcome(ending: Ending | None) -> str:
    """Metrics label for how a stream ended; `cancelled` if it has no ending."""
    match ending:
        case Finish(reason=reason):
            return reason.value
        case Scored():
            return "scored"
        case HandedOver():
            return "handed_over"
        case None:
            return "cancelled"
        case _:
            return "error"

"""What one pass of the model adds to a stream, and how a stream ends."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.checkpoint import Finish, TokenLogprobs
from server.errors import RequestError


@dataclass(frozen=True)
class Scored:
    """Bits by which each token of the prompt surprised the model."""

    bits: tuple[float, ...]


@dataclass(frozen=True)
class HandedOver:
    """The stream is not over, but this server no longer serves it."""


Ending = Finish | Scored | RequestError | HandedOver


class Backlog(NamedTuple):
    """What a stream did before its subscriber came."""

    tokens: array[int]
    text: str
    logprobs: Sequence[TokenLogprobs]
    prompt: Sequence[TokenLogprobs]


class StreamUpdate(NamedTuple):
    """News of one stream, for its subscriber."""

    token: int | None = None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    prompt: Sequence[TokenLogprobs] = ()
    ending: Ending | None = None
    backlog: Backlog | None = None


def outcome(ending: Ending | None) -> str:
    """One word for how a stream ended; `cancelled` for one that its subscriber left."""
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

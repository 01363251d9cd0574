"""How far a stream is: all that is needed to continue it, on this server or on another."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from server.arrays import State


class FinishReason(enum.Enum):
    """Why a stream ended without an error."""

    END = "end"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    TIME_LIMIT = "time_limit"
    PAUSED = "paused"


@dataclass(frozen=True)
class Finish:
    """How a stream ended without an error; times are in seconds since it was accepted.

    stop: the stop string that was found. generated: number of tokens, unsent ones included.
    """

    reason: FinishReason
    stop: str | None
    generated: int
    queue_s: float
    first_token_s: float
    total_s: float
    state_bytes: int


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of a token and of the most likely tokens at its position."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class SavedState:
    """A copy of a stream's state outside any slot, and the number of tokens pushed into it."""

    state: State
    pushed: int


@dataclass(frozen=True)
class Checkpoint:
    """How far one output is. Everything else that a running stream holds follows from this.

    generated: the generated tokens, without those that are not sent (such as an end token).
    saved: the state after some of the tokens; None if no token is pushed.
    finish: how the output ended; None if it has not.
    base_tokens, base_characters: how many of them came before the stream was last continued.
    queue_s, first_token_s: seconds from acceptance to its start, and to its first token.
    """

    generated: array[int]
    saved: SavedState | None = None
    finish: Finish | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    base_tokens: int = 0
    base_characters: int = 0
    queue_s: float | None = None
    first_token_s: float | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the stream was paused, so that it can be continued."""
        return self.finish is not None and self.finish.reason is FinishReason.PAUSED

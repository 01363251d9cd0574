"""How far a stream has come: all that is needed to go on with it, here or on another server."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from server.arrays import State


class FinishReason(enum.Enum):
    """Why a stream ended well."""

    END = "end"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    TIME_LIMIT = "time_limit"
    PAUSED = "paused"


@dataclass(frozen=True)
class Finish:
    """The end of a stream that went well; times in seconds since it was accepted."""

    reason: FinishReason
    stop: str | None
    generated: int
    queue_s: float
    first_token_s: float
    total_s: float
    state_bytes: int


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms: of the token, and of the tokens that the model held likeliest."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class SavedState:
    """A stream's state outside any slot, and the number of tokens it has seen."""

    state: State
    pushed: int


@dataclass(frozen=True)
class Checkpoint:
    """All that an output has behind it. What else it holds while it runs follows from this.

    generated: the tokens that were sent, or will be. saved: the state after some of all its
    tokens; None for the very first. finish: how it ended; None if it did not.
    base_tokens, base_characters: how many there were when the stream last went on after a pause.
    queue_s, first_token_s: from its acceptance until it began, and until its first token.
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
        """Whether the stream was stopped in order to go on."""
        return self.finish is not None and self.finish.reason is FinishReason.PAUSED

"""What is asked of a stream, and what its reader is told: the words between engine and service."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.engine.sampling.logprobs import TokenLogprobs
from server.engine.sampling.sampler import SamplingParameters
from server.errors import RequestError
from server.runtime.onnx_session import Ints


class FinishReason(enum.Enum):
    """Why a stream ended well."""

    END = "end"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    TIME_LIMIT = "time_limit"
    PAUSED = "paused"


@dataclass(frozen=True)
class Request:
    """A validated request. `prompt[0]` is the start token; the others are the caller's tokens."""

    prompt: Ints
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    include_stop: bool = False
    min_tokens: int = 0
    end_token: int | None = None
    time_limit_s: float | None = None
    complete_at: int | None = None
    """Number of tokens, prompt included, that make the stream complete (an image)."""
    score: bool = False
    """Report how surprising the prompt is instead of generating."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens are reported with each token of the prompt."""
    stream_interval: int = 1
    """Fewest tokens of a delta that is neither the first nor the last."""
    priority: int = 0
    """Streams of a higher one go first, and take the slots of those of a lower one."""

    @property
    def last_position(self) -> int:
        """Tokens that the stream has pushed at its end, if nothing ends it before."""
        return len(self.prompt) - 1 + (0 if self.score else self.max_tokens)

    @property
    def predicts_prompt(self) -> bool:
        """Whether the logits of the prompt's tokens are needed."""
        return self.score or self.prompt_logprobs is not None

    def is_unsent(self, token: int) -> bool:
        """Whether the stream ends with this token and without sending it."""
        return token == self.end_token or (token in self.stop_tokens and not self.include_stop)


@dataclass(frozen=True)
class Delta:
    """Tokens that were generated one after the other, and the text they completed."""

    first_position: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each token, if they were asked for."""


@dataclass(frozen=True)
class PromptLogprobs:
    """Tokens of the prompt, one after the other, and how likely they were."""

    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


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
class Scored:
    """Bits by which each token of the prompt surprised the model."""

    bits: tuple[float, ...]


@dataclass(frozen=True)
class HandedOver:
    """The stream is not over, but this server serves it no longer."""


Ending = Finish | Scored | RequestError | HandedOver
Event = PromptLogprobs | Delta | Ending


class Piece(NamedTuple):
    """What one pass of the model adds to a stream's buffer."""

    token: int | None = None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    prompt: Sequence[TokenLogprobs] = ()
    ending: Ending | None = None
    backlog: Backlog | None = None


class Backlog(NamedTuple):
    """What a stream did before its reader came."""

    tokens: array[int]
    text: str
    logprobs: Sequence[TokenLogprobs]
    prompt: Sequence[TokenLogprobs]


def outcome(ending: Ending | None) -> str:
    """One word for how a stream ended; None for one that its reader left."""
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

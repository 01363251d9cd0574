"""The events of a stream, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class FinishReason(StrEnum):
    """Why a stream ended."""

    END = "end"  # the model drew its end token, or the image is complete
    STOP = "stop"  # a stop string or a stop token id was drawn
    MAX_TOKENS = "max_tokens"
    TIME_LIMIT = "time_limit"
    PAUSED = "paused"  # `sessions.pause` stopped it; `sessions.continue_` goes on
    UNKNOWN = "unknown"  # a reason that only newer clients know


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of a stream are drawn, with all defaults filled in."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    allowed_token_ids: tuple[int, ...]
    bad_words: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a stream ends, with all defaults filled in. `time_limit`: seconds, None for no limit."""

    max_tokens: int
    min_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop: bool
    ignore_eos: bool
    time_limit: float | None


@dataclass(frozen=True, slots=True)
class Output:
    """What is sent, with all defaults filled in. None: no log-probabilities."""

    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    stream_interval: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The server has accepted the request; always the first event.

    keep: seconds that the stream is kept without a reader; 0 if it is not kept.
    durable: whether it survives the loss of the replica that serves it.
    """

    sequence: int
    stream_id: str
    model: str
    fingerprint: str
    sampling: Sampling
    stopping: Stopping
    prompt_tokens: int
    output: Output
    priority: int = 0
    keep: float = 0.0
    durable: bool = False

    @property
    def seed(self) -> int:
        """The seed in use; the same seed, prompt and bundle give the same stream."""
        return self.sampling.seed


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities of a token, and of the likeliest tokens there.

    token, top_tokens: the tokens as strings: their text, or the names of special tokens.
    piece, top_pieces: the bytes of text that they are; none for special tokens. All of them are
    empty for image models.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]
    token: str = ""
    piece: bytes = b""
    top_tokens: tuple[str, ...] = ()
    top_pieces: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of further tokens of the prompt, from `first_position` on."""

    sequence: int
    first_position: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Further tokens. `first_position` counts from the prompt's first token, which is 0.

    text: whole characters that the tokens complete, for text models.
    rgb: three bytes per token, for image models.
    output: which of the `n` outputs they belong to.
    logprobs: one for each token, if they are requested.
    """

    sequence: int
    first_position: int
    ids: tuple[int, ...]
    text: str
    rgb: bytes
    output: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts, times in seconds since the stream was accepted, and bytes of one stream."""

    prompt_tokens: int
    generated_tokens: int
    queue_time: float
    time_to_first_token: float
    total_time: float
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An output is complete; always its last event. stop: the stop string that ended it."""

    sequence: int
    reason: FinishReason
    stop: str | None
    usage: Usage
    output: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    """How much of one output has arrived, for `resume`.

    characters: of text, in code points. ended: whether its `Finished` has arrived.
    prompt_logprobs: tokens of the prompt whose log-probabilities have arrived.
    """

    output: int = 0
    tokens: int = 0
    characters: int = 0
    ended: bool = False
    prompt_logprobs: int = 0


Event: TypeAlias = Accepted | PromptLogprobs | Tokens | Finished

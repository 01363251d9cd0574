"""What a stream is asked to do: the request as the engine, the sessions and the snapshots know it.

The message it came in ends in `server.api`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.arrays import Ints


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens that a stream continues. The model is fed a start token before them.

    tokens: `[T]`, in the smallest unsigned type that holds the vocabulary; see `prompt_of`.
    """

    start: int
    """Id of the start token: the vocabulary's size, or beyond it where there is a label."""
    tokens: npt.NDArray[np.unsignedinteger]

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prompt):
            return NotImplemented
        return self.start == other.start and np.array_equal(self.tokens, other.tokens)

    __hash__ = None  # type: ignore[assignment]

    @property
    def last(self) -> int:
        """The token that the first drawn one follows: the start token of an empty prompt."""
        return int(self.tokens[-1]) if len(self.tokens) else self.start

    def inputs(self, begin: int = 0, end: int | None = None) -> Ints:
        """What prefill feeds at positions `begin` to `end`, by default all: `[end - begin]`.

        The start token, then every token but the last, which the first step feeds.
        """
        end = len(self) if end is None else min(end, len(self))
        if begin >= end:
            return np.zeros(0, np.int64)
        tokens = self.tokens[max(0, begin - 1) : end - 1].astype(np.int64)
        return tokens if begin else np.concatenate(([self.start], tokens))

    def targets(self, begin: int, count: int) -> Ints:
        """The tokens that the inputs at positions `begin` to `begin + count` should predict."""
        return self.tokens[begin : begin + count].astype(np.int64)


def prompt_of(start: int, tokens: npt.ArrayLike, typecode: str) -> Prompt:
    """A prompt whose `tokens[T]` are kept as `array.array` keeps those of `typecode`."""
    return Prompt(start, np.asarray(tokens, np.int64).astype(np.dtype(typecode)))


@dataclass(frozen=True)
class LogitsProcessors:
    """How the logits of one stream change; see SamplingParameters in generation_service.proto.

    bad_words: the tokens of each. withheld: ids that are not drawn before `min_tokens`.
    """

    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    withheld: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


LONGEST_BAD_WORD = 64
"""Most tokens of a bad word."""


@dataclass(frozen=True)
class SamplingParameters:
    """How one stream draws its tokens; see the field comments in generation_service.proto.

    logprobs: how many of the likeliest tokens are reported with each token; None for no report.
    processors: what changes its logits; None for a stream that asks for nothing of the kind.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    typical_p: float = 1.0
    output: int = 0
    logprobs: int | None = None
    processors: LogitsProcessors | None = None


@dataclass(frozen=True)
class Request:
    """One output of a validated request."""

    prompt: Prompt
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
    """Streams of a higher priority go first, and take the slots of those of a lower one."""

    @property
    def last_position(self) -> int:
        """Tokens that the stream has pushed at its end, if nothing ends it before."""
        return len(self.prompt) + (0 if self.score else self.max_tokens)

    @property
    def predicts_prompt(self) -> bool:
        """Whether the logits of the prompt's tokens are needed."""
        return self.score or self.prompt_logprobs is not None

    def is_unsent(self, token: int) -> bool:
        """Whether the stream ends with this token and does not send it."""
        return token == self.end_token or (token in self.stop_tokens and not self.include_stop)


@dataclass(frozen=True)
class Lease:
    """What a server has taken on under one name.

    requests: one for each output; they share one prompt.
    keep_s: how long the stream is kept while nobody reads it; 0 for one that ends with its reader.
    accepted_at: in seconds of the Unix time.
    """

    stream_id: str
    requests: tuple[Request, ...]
    owner: str = ""
    keep_s: float = 0.0
    accepted_at: float = 0.0

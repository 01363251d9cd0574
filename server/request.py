"""A validated request, as the engine, the sessions and the snapshots use it.

`server.api` makes it from the protobuf message; nothing behind the API sees that message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from server.arrays import Bools, Ints


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens that a stream continues. The model gets a start token before them.

    tokens: `[T]`, in the smallest unsigned type that holds the vocabulary; see `prompt_of`.
    """

    start: int
    """Id of the start token: the vocabulary's size, plus 1 + its index if there is a label."""
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
        """The last token before the first generated one; the start token if the prompt is empty."""
        return int(self.tokens[-1]) if len(self.tokens) else self.start

    def inputs(self, begin: int = 0, end: int | None = None) -> Ints:
        """The tokens that prefill pushes at positions `begin` to `end`, `[end - begin]`.

        They are the start token, then every token but the last one. The first decode step pushes
        the last one.
        """
        end = len(self) if end is None else min(end, len(self))
        if begin >= end:
            return np.zeros(0, np.int64)
        tokens = self.tokens[max(0, begin - 1) : end - 1].astype(np.int64)
        return tokens if begin else np.concatenate(([self.start], tokens))

    def targets(self, begin: int, count: int) -> Ints:
        """The next tokens after the inputs at positions `begin` to `begin + count`."""
        return self.tokens[begin : begin + count].astype(np.int64)


def prompt_of(start: int, tokens: npt.ArrayLike, typecode: str) -> Prompt:
    """A prompt of `tokens[T]`, stored in the integer type of `typecode` (see `array.array`)."""
    return Prompt(start, np.asarray(tokens, np.int64).astype(np.dtype(typecode)))


@dataclass(frozen=True)
class LogitsProcessors:
    """Changes to the logits of one stream; see SamplingParameters in generation_service.proto.

    bad_words: the tokens of each word. bad_bytes: words whose letters are not tokens. withheld: ids
    that are not drawn before `min_tokens`.
    """

    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    bad_bytes: tuple[bytes, ...] = ()
    min_tokens: int = 0
    withheld: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


class Matcher(Protocol):
    """Follows an output through a grammar, token by token."""

    def copy(self) -> Matcher:
        """One that stands at the same place, and goes on by itself."""

    def allowed(self) -> tuple[Bools, bool]:
        """Whether each token may come next, `[V]`, and whether the output may end here."""

    def push(self, tokens: Sequence[int]) -> None:
        """Go on with `tokens`. One that may not come next is a fault."""

    def fits(self, tokens: Sequence[int]) -> bool:
        """Whether all of `tokens` may come next. Stays where it is."""

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete, and nothing may follow."""

    @property
    def fault(self) -> str:
        """Why it cannot go on; empty if it can."""


@dataclass(frozen=True)
class Grammar:
    """What an output must be; see the message Grammar in generation_service.proto.

    kind: the name of its field there. texts: the schema, the expression or the grammar; the strings
    of a choice. beginning: where outputs begin. It never goes on: outputs go on with copies.
    """

    kind: str
    texts: tuple[str, ...]
    beginning: Matcher = field(compare=False, repr=False)


_GRAMMAR_BYTES = 1 << 20  # about what most compiled ones take, with the states met on the way

LONGEST_BAD_WORD = 64
"""Largest number of tokens in a bad word, or of bytes if its letters are not tokens."""

NUMBER_BYTES = 32
"""About the memory of a number in a list; of a string, besides its characters, it is more."""

_TEXT_BYTES = 80


@dataclass(frozen=True)
class SamplingParameters:
    """How one stream draws its tokens; see the field comments in generation_service.proto.

    output: index of the output in its request.
    logprobs: number of most likely tokens to report with each token; None reports nothing.
    processors: changes to the logits; None if there are none.
    grammar: what the output must be; None if it may be anything.
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
    grammar: Grammar | None = None


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
    end_tokens: frozenset[int] = frozenset()
    time_limit_s: float | None = None
    complete_at: int | None = None
    """Number of tokens, prompt included, that make the stream complete (an image)."""
    score: bool = False
    """Score the prompt (its bits per token) instead of generating."""
    prompt_logprobs: int | None = None
    """Number of most likely tokens to report with each prompt token; None reports nothing."""
    stream_interval: int = 1
    """Fewest tokens in a delta, except in the first and the last one."""
    priority: int = 0
    """A stream of higher priority goes first and takes the slot of one of lower priority."""

    @property
    def last_position(self) -> int:
        """Number of tokens pushed when the stream ends by `max_tokens`."""
        return len(self.prompt) + (0 if self.score else self.max_tokens)

    @property
    def predicts_prompt(self) -> bool:
        """Whether the logits of the prompt's tokens are needed."""
        return self.score or self.prompt_logprobs is not None

    @property
    def lists_bytes(self) -> int:
        """About how much memory its lists take: what it holds besides the prompt."""
        numbers = len(self.stop_tokens)
        if (given := self.sampling.processors) is not None:
            numbers += 2 * len(given.bias) + len(given.allowed) + len(given.withheld)
            numbers += sum(map(len, given.bad_words)) + sum(map(len, given.bad_bytes))
        size = NUMBER_BYTES * numbers + sum(_TEXT_BYTES + 4 * len(text) for text in self.stop)
        if (grammar := self.sampling.grammar) is not None:
            size += _GRAMMAR_BYTES + sum(_TEXT_BYTES + 4 * len(text) for text in grammar.texts)
        return size

    def is_unsent(self, token: int) -> bool:
        """Whether this token ends the stream and is not sent."""
        return token in self.end_tokens or (token in self.stop_tokens and not self.include_stop)


LONGEST_KEEP_S = 24 * 3600
"""Longest time that a stream is kept without a reader, in seconds."""


@dataclass(frozen=True)
class Lease:
    """What a server has accepted under one name.

    requests: one for each output; they share one prompt.
    keep_s: seconds that the stream is kept without a reader; 0 ends it when its reader disconnects.
    accepted_at: Unix time in seconds.
    epoch: how often the stream has changed its owner; the first is 1.
    """

    stream_id: str
    requests: tuple[Request, ...]
    owner: str = ""
    keep_s: float = 0.0
    accepted_at: float = 0.0
    epoch: int = 1

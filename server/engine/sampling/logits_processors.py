"""What changes logits before anything is drawn: biases, tokens that may not be, and penalties.

A stream with rules has a `Memory` of the tokens it has seen. Those of a batch lie in one array for
each of their fields, so that a step updates and applies all of them at once.
Shapes: `B` streams, `E` of them with rules, `V` vocabulary, `T` tokens remembered in their order,
`W` bad words, `H` withheld tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LONGEST_WORD = 64
"""Most tokens of a bad word."""

_ANY = -1  # in a bad word: nothing has to stand here
_NOTHING = -2  # in a memory: no token yet


@dataclass(frozen=True)
class LogitRules:
    """How the logits of one stream are changed; see SamplingParameters in generation_service.proto.

    bad_words: the tokens of each. withheld: what is not drawn before `min_tokens`.
    """

    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    withheld: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


@dataclass
class Memory:
    """What the rules of one stream have to know of it; kept while the stream is parked.

    offset: what is added to every logit whatever was drawn, `[V]`. counts: how often the output has
    each token, `[V]`. seen: whether prompt or output have it, `[V]`. tail: the last tokens of the
    output, `[T]`. first: position of the output's first token.
    """

    rules: LogitRules
    offset: Doubles
    counts: Ints
    seen: Bools
    tail: Ints
    first: int

    @staticmethod
    def of(rules: LogitRules, prompt: Ints, vocabulary: int) -> Memory:
        """Of a stream that has generated nothing; `prompt[0]` is its start token."""
        offset = np.zeros(vocabulary)
        for token, bias in rules.bias:
            offset[token] = bias
        if rules.allowed:
            offset[np.setdiff1d(np.arange(vocabulary), rules.allowed)] = -np.inf
        seen = np.zeros(vocabulary, np.bool_)
        seen[prompt[1:]] = True
        return Memory(
            rules,
            offset,
            np.zeros(vocabulary, np.int64),
            seen,
            np.full(LONGEST_WORD - 1, _NOTHING, np.int64),
            len(prompt) - 1,
        )

    def recall(self, tokens: Ints) -> None:
        """Take in `tokens[N]`, the first that the stream generated."""
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self.seen[tokens] = True
        self.tail = np.concatenate((self.tail, tokens))[-len(self.tail) :]


@dataclass(frozen=True)
class RuleBatch:
    """The rules and memories of those streams of a batch that have any."""

    rows: Ints
    """Their rows of the batch, `[E]`."""

    offset: Doubles
    counts: Ints
    seen: Bools
    tails: Ints

    repetition: Doubles = field(repr=False)
    frequency: Doubles = field(repr=False)
    presence: Doubles = field(repr=False)

    word_owner: Ints = field(repr=False)
    """Which of the E streams each bad word belongs to, `[W]`."""

    word_start: Ints = field(repr=False)
    """All of each bad word but its last token, aligned with the tails, `[W, T]`."""

    word_last: Ints = field(repr=False)

    withheld_owner: Ints = field(repr=False)
    withheld: Ints = field(repr=False)
    withheld_until: Ints = field(repr=False)
    """Position from which each withheld token may be drawn, `[H]`."""

    @staticmethod
    def of(memories: Sequence[Memory | None]) -> RuleBatch | None:
        """None if no stream of the batch has rules. The memories become views of the batch's."""
        rows = [row for row, memory in enumerate(memories) if memory is not None]
        if not rows:
            return None
        owned = [memory for memory in memories if memory is not None]
        rules = [memory.rules for memory in owned]
        words = [(owner, word) for owner, r in enumerate(rules) for word in r.bad_words]
        held = [
            (owner, token, owned[owner].first + r.min_tokens)
            for owner, r in enumerate(rules)
            for token in r.withheld
        ]
        starts = np.full((len(words), LONGEST_WORD - 1), _ANY, np.int64)
        for start, (_, word) in zip(starts, words, strict=True):
            start[len(start) - len(word) + 1 :] = word[:-1]
        batch = RuleBatch(
            rows=np.array(rows),
            offset=np.stack([memory.offset for memory in owned]),
            counts=np.stack([memory.counts for memory in owned]),
            seen=np.stack([memory.seen for memory in owned]),
            tails=np.stack([memory.tail for memory in owned]),
            repetition=np.array([[r.repetition_penalty] for r in rules]),
            frequency=np.array([[r.frequency_penalty] for r in rules]),
            presence=np.array([[r.presence_penalty] for r in rules]),
            word_owner=np.array([owner for owner, _ in words], np.int64),
            word_start=starts,
            word_last=np.array([word[-1] for _, word in words], np.int64),
            withheld_owner=np.array([owner for owner, _, _ in held], np.int64),
            withheld=np.array([token for _, token, _ in held], np.int64),
            withheld_until=np.array([until for _, _, until in held], np.int64),
        )
        for owner, memory in enumerate(owned):
            memory.counts, memory.seen = batch.counts[owner], batch.seen[owner]
            memory.tail = batch.tails[owner]
        return batch

    def apply(self, logits: Floats, positions: Ints) -> Doubles:
        """A copy of the batch's `logits[B, V]`, changed; `positions[B]` are those to draw for."""
        changed = logits.astype(np.float64)
        ours: Doubles = changed[self.rows] + self.offset
        if len(self.word_last):
            start = self.word_start
            complete = ((start == self.tails[self.word_owner]) | (start == _ANY)).all(axis=1)
            ours[self.word_owner[complete], self.word_last[complete]] = -np.inf
        if len(self.withheld):
            early = positions[self.rows][self.withheld_owner] < self.withheld_until
            ours[self.withheld_owner[early], self.withheld[early]] = -np.inf
        scaled = np.where(ours > 0, ours / self.repetition, ours * self.repetition)
        ours = np.where(self.seen, scaled, ours)
        ours -= self.frequency * self.counts + self.presence * (self.counts > 0)
        changed[self.rows] = ours
        return changed

    def remember(self, tokens: Ints) -> None:
        """Take the tokens `[B]` that the batch drew into the memories."""
        drawn, owners = tokens[self.rows], np.arange(len(self.rows))
        self.counts[owners, drawn] += 1
        self.seen[owners, drawn] = True
        self.tails[:, :-1] = self.tails[:, 1:]
        self.tails[:, -1] = drawn

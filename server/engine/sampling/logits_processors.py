"""Logits processors: biases, forbidden tokens and penalties, applied before a token is drawn.

A stream with processors has a `PenaltyState`, which counts its tokens. A `ProcessorBatch` holds the
states of a batch, one array for each field, so that a step updates all of them at once.
Shapes: `B` streams, `E` of them with processors, `V` vocabulary, `T` last tokens of an output,
`W` bad words, `H` withheld tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from concertina.codecs.token_text import TokenText
from server.arrays import Bools, Doubles, Floats, Ints
from server.engine.sampling.bad_words import BadWords
from server.request import LONGEST_BAD_WORD, LogitsProcessors, Prompt

_ANY = -1  # in the start of a bad word: matches any token
_NO_TOKEN = -2  # in a tail: no token yet


@dataclass
class PenaltyState:
    """What the processors of one stream keep from token to token, also while it is parked.

    offset: value to add to each logit, `[V]`. counts: how often the output has each token, `[V]`.
    seen: whether the prompt or the output has it, `[V]`. tail: the last tokens of the output,
    `[T]`. first: position of the output's first token. words: what the output must not contain.
    """

    processors: LogitsProcessors
    offset: Doubles
    counts: Ints
    seen: Bools
    tail: Ints
    first: int
    words: BadWords | None = None

    @staticmethod
    def of(
        processors: LogitsProcessors, prompt: Prompt, vocabulary: int, text: TokenText | None = None
    ) -> PenaltyState:
        """The state of a stream that has generated no token.

        text: what tokens stand for; needed if there are `bad_bytes`.
        """
        offset = np.zeros(vocabulary)
        for token, bias in processors.bias:
            offset[token] = bias
        if processors.allowed:
            offset[np.setdiff1d(np.arange(vocabulary), processors.allowed)] = -np.inf
        seen = np.zeros(vocabulary, np.bool_)
        seen[prompt.tokens] = True
        return PenaltyState(
            processors,
            offset,
            np.zeros(vocabulary, np.int64),
            seen,
            np.full(LONGEST_BAD_WORD - 1, _NO_TOKEN, np.int64),
            len(prompt),
            BadWords(processors.bad_bytes, text) if processors.bad_bytes and text else None,
        )

    def recall(self, tokens: Ints) -> None:
        """Add `tokens[N]` that the stream has generated earlier."""
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self.seen[tokens] = True
        self.tail = np.concatenate((self.tail, tokens))[-len(self.tail) :]
        if self.words is not None:
            for token in tokens.tolist():
                self.words.push(token)


@dataclass(frozen=True)
class ProcessorBatch:
    """The processors and penalty states of the streams of a batch that have any."""

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
    """Index of the stream, among the E, that each bad word belongs to, `[W]`."""

    word_start: Ints = field(repr=False)
    """Each bad word without its last token, aligned with the tails, `[W, T]`."""

    word_last: Ints = field(repr=False)

    withheld_owner: Ints = field(repr=False)
    withheld: Ints = field(repr=False)
    withheld_until: Ints = field(repr=False)
    """Position from which each withheld token may be drawn, `[H]`."""

    spelt: dict[int, BadWords] = field(repr=False)
    """Bad words whose letters are not tokens, by stream."""

    @staticmethod
    def of(states: Sequence[PenaltyState | None]) -> ProcessorBatch | None:
        """The batch of `states`, one for each row; None if no row has any.

        The arrays of the states become views of the batch's arrays.
        """
        rows = [row for row, state in enumerate(states) if state is not None]
        if not rows:
            return None
        owned = [state for state in states if state is not None]
        processors = [state.processors for state in owned]
        words = [(owner, word) for owner, p in enumerate(processors) for word in p.bad_words]
        held = [
            (owner, token, owned[owner].first + p.min_tokens)
            for owner, p in enumerate(processors)
            for token in p.withheld
        ]
        starts = np.full((len(words), LONGEST_BAD_WORD - 1), _ANY, np.int64)
        for start, (_, word) in zip(starts, words, strict=True):
            start[len(start) - len(word) + 1 :] = word[:-1]
        batch = ProcessorBatch(
            rows=np.array(rows),
            offset=np.stack([state.offset for state in owned]),
            counts=np.stack([state.counts for state in owned]),
            seen=np.stack([state.seen for state in owned]),
            tails=np.stack([state.tail for state in owned]),
            repetition=np.array([[p.repetition_penalty] for p in processors]),
            frequency=np.array([[p.frequency_penalty] for p in processors]),
            presence=np.array([[p.presence_penalty] for p in processors]),
            word_owner=np.array([owner for owner, _ in words], np.int64),
            word_start=starts,
            word_last=np.array([word[-1] for _, word in words], np.int64),
            withheld_owner=np.array([owner for owner, _, _ in held], np.int64),
            withheld=np.array([token for _, token, _ in held], np.int64),
            withheld_until=np.array([until for _, _, until in held], np.int64),
            spelt={n: s.words for n, s in enumerate(owned) if s.words is not None},
        )
        for owner, state in enumerate(owned):
            state.counts, state.seen = batch.counts[owner], batch.seen[owner]
            state.tail = batch.tails[owner]
        return batch

    def apply(self, logits: Floats, positions: Ints) -> Doubles:
        """A changed copy of `logits[B, V]`, from which the tokens at `positions[B]` are drawn."""
        changed = logits.astype(np.float64)
        ours: Doubles = changed[self.rows] + self.offset
        if len(self.word_last):
            start = self.word_start
            complete = ((start == self.tails[self.word_owner]) | (start == _ANY)).all(axis=1)
            ours[self.word_owner[complete], self.word_last[complete]] = -np.inf
        for owner, spelt in self.spelt.items():
            ours[owner, spelt.forbidden()] = -np.inf
        if len(self.withheld):
            early = positions[self.rows][self.withheld_owner] < self.withheld_until
            ours[self.withheld_owner[early], self.withheld[early]] = -np.inf
        scaled = np.where(ours > 0, ours / self.repetition, ours * self.repetition)
        ours = np.where(self.seen, scaled, ours)
        ours -= self.frequency * self.counts + self.presence * (self.counts > 0)
        changed[self.rows] = ours
        return changed

    def remember(self, tokens: Ints) -> None:
        """Add the drawn `tokens[B]` to the penalty states."""
        drawn, owners = tokens[self.rows], np.arange(len(self.rows))
        self.counts[owners, drawn] += 1
        self.seen[owners, drawn] = True
        self.tails[:, :-1] = self.tails[:, 1:]
        self.tails[:, -1] = drawn
        for owner, spelt in self.spelt.items():
            spelt.push(int(drawn[owner]))

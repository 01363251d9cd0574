"""Logits processors: biases, forbidden tokens and penalties, applied before a token is drawn.

A stream with processors has a `PenaltyState`, with an entry for each token that they change. A
`ProcessorBatch` holds the entries of a batch in a row, so that a step updates all of them at once.
Shapes: `B` streams, `E` of them with processors, `V` vocabulary, `T` last tokens of an output,
`N` entries, `W` bad words, `H` withheld tokens, `A` allowed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from concertina.codecs.token_text import TokenText
from server.arrays import Doubles, Floats, Ints
from server.engine.sampling.bad_words import BadWords
from server.engine.sampling.long_rows import LONG_ROW
from server.request import LONGEST_BAD_WORD, LogitsProcessors, Prompt

_ANY = -1  # in the start of a bad word: matches any token
_NO_TOKEN = -2  # in a tail or an entry: no token yet
_FEWEST_ENTRIES = 16
_BY_ENTRY = ("tokens", "offset", "repetition", "counts")
_ALL = slice(None)


@dataclass
class PenaltyState:
    """What the processors of one stream keep from token to token, also while it is parked.

    In a large vocabulary, an entry is a token with a bias or, if there are penalties, one that the
    prompt or the output has. In a small one, every token has an entry: that is faster. tokens: of
    each entry, `[N]`; unused ones are at the end. offset: value to add to the logit, `[N]`.
    repetition: what to divide or multiply it by, `[N]`. counts: how often the output has the token,
    `[N]`. size: number of entries in use. tail: the last tokens of the output, `[T]`. first:
    position of the output's first token. words: what the output must not contain.
    """

    processors: LogitsProcessors
    vocabulary: int
    tokens: Ints
    offset: Doubles
    repetition: Doubles
    counts: Ints
    size: int
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
        bias, seen = dict(processors.bias), np.zeros(0, np.int64)
        if processors.repetition_penalty != 1:
            seen = np.unique(prompt.tokens).astype(np.int64)
        is_small = vocabulary < LONG_ROW
        tokens = np.union1d(np.array([*bias], np.int64), seen)
        if is_small:
            tokens = np.arange(vocabulary)
        offset = np.zeros(len(tokens))
        offset[np.searchsorted(tokens, [*bias])] = [*bias.values()]
        if is_small and processors.allowed:
            offset[np.setdiff1d(tokens, processors.allowed)] = -np.inf
        repetition = np.ones(len(tokens))
        repetition[np.searchsorted(tokens, seen)] = processors.repetition_penalty
        counts = np.zeros(len(tokens), np.int64)
        tail = np.full(LONGEST_BAD_WORD - 1, _NO_TOKEN, np.int64)
        return PenaltyState(
            processors,
            vocabulary,
            tokens,
            offset,
            repetition,
            counts,
            len(tokens),
            tail,
            len(prompt),
            BadWords(processors.bad_bytes, text) if processors.bad_bytes and text else None,
        )

    @property
    def is_counting(self) -> bool:
        """Whether it matters which tokens the output has."""
        p = self.processors
        return (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) != (1, 0, 0)

    def recall(self, tokens: Ints) -> None:
        """Add `tokens[N]` that the stream has generated earlier."""
        self.tail = np.concatenate((self.tail, tokens))[-len(self.tail) :]
        if self.words is not None:
            for token in tokens.tolist():
                self.words.push(token)
        if not self.is_counting:
            return
        drawn, counts = np.unique(tokens, return_counts=True)
        new = np.setdiff1d(drawn, self.tokens[: self.size])
        self._resize(self.size + len(new))
        self.tokens[self.size - len(new) :] = new
        order = np.argsort(self.tokens)
        at = order[np.searchsorted(self.tokens, drawn, sorter=order)]
        self.counts[at] += counts
        self.repetition[at] = self.processors.repetition_penalty

    def detach(self) -> None:
        """Have memory of its own, so that a parked stream does not hold that of its last batch."""
        self._resize(self.size)

    def _resize(self, size: int) -> None:
        more, kept = size - self.size, slice(self.size)
        self.tokens = np.append(self.tokens[kept], np.full(more, _NO_TOKEN))
        self.offset = np.append(self.offset[kept], np.zeros(more))
        self.repetition = np.append(self.repetition[kept], np.ones(more))
        self.counts = np.append(self.counts[kept], np.zeros(more, np.int64))
        self.tail, self.size = self.tail.copy(), size


@dataclass(frozen=True)
class _Entries:
    """The entries of all streams of a batch. The arrays of the states are views of these.

    Arrays without a comment are as in `PenaltyState`.
    """

    tokens: Ints
    offset: Doubles
    repetition: Doubles
    counts: Ints
    owner: Ints
    """Index of the stream, among the E, that each entry belongs to, `[N]`."""
    penalty: Doubles
    """What `repetition` is once the token is seen, `[N]`."""
    frequency: Doubles
    presence: Doubles
    starts: Ints
    """Index of each stream's first entry, and the number of all, `[E + 1]`."""
    counting: Ints
    """The streams for which it matters which tokens their output has."""

    @staticmethod
    def of(states: Sequence[PenaltyState]) -> _Entries:
        room = [_room(state) for state in states]
        starts = np.cumsum([0, *room])
        count, owner = int(starts[-1]), np.repeat(np.arange(len(states)), room)
        processors = [state.processors for state in states]
        entries = _Entries(
            tokens=np.full(count, _NO_TOKEN, np.int64),
            offset=np.zeros(count),
            repetition=np.ones(count),
            counts=np.zeros(count, np.int64),
            owner=owner,
            penalty=np.array([p.repetition_penalty for p in processors])[owner],
            frequency=np.array([p.frequency_penalty for p in processors])[owner],
            presence=np.array([p.presence_penalty for p in processors])[owner],
            starts=starts,
            counting=np.array([n for n, s in enumerate(states) if s.is_counting], np.int64),
        )
        for number, (state, start) in enumerate(zip(states, starts.tolist(), strict=False)):
            used, end = slice(start, start + state.size), start + room[number]
            for name in _BY_ENTRY:
                ours = getattr(entries, name)
                ours[used] = getattr(state, name)[: state.size]
                setattr(state, name, ours[start:end])
        return entries

    def apply(self, logits: Doubles, part: slice = _ALL) -> Doubles:
        """The changed `logits[N]` of the tokens of a part of the entries."""
        repetition, counts = self.repetition[part], self.counts[part]
        logits = logits + self.offset[part]
        logits = np.where(logits > 0, logits / repetition, logits * repetition)
        logits -= self.frequency[part] * counts + self.presence[part] * (counts > 0)
        return logits

    def remember(self, drawn: Ints, is_small: bool) -> Ints:
        """Count `drawn[E]`. Returns the streams that have no entry for theirs, but need one."""
        if is_small:
            known = (self.starts[:-1] + drawn)[drawn >= 0]
        else:
            known = np.flatnonzero(self.tokens == drawn[self.owner])
        self.counts[known] += 1
        self.repetition[known] = self.penalty[known]
        if is_small:
            return known[:0]
        missing = np.zeros(len(drawn), np.bool_)
        missing[self.counting] = True
        missing[self.owner[known]] = False
        return np.flatnonzero(missing & (drawn >= 0))

    def add(self, states: Sequence[PenaltyState], owners: Ints, drawn: Ints) -> bool:
        """Give the streams `owners` an entry each for what they have drawn, if there is room."""
        at = self.starts[owners] + [states[owner].size for owner in owners.tolist()]
        if (at >= self.starts[owners + 1]).any():
            return False
        self.tokens[at], self.counts[at] = drawn[owners], 1
        self.repetition[at] = self.penalty[at]
        for owner in owners.tolist():
            states[owner].size += 1
        return True


def _room(state: PenaltyState) -> int:
    """Number of entries to have memory for: those in use, and as many where more will come."""
    if not state.is_counting:
        return state.size
    return min(state.vocabulary, max(_FEWEST_ENTRIES, 2 * state.size))


@dataclass
class ProcessorBatch:
    """The processors and penalty states of the streams of a batch that have any."""

    rows: Ints
    """Their rows of the batch, `[E]`."""

    states: list[PenaltyState]
    entries: _Entries
    tails: Ints

    allowed: list[Ints] = field(repr=False)
    """The only tokens of each stream, `[A]`; empty if it may draw all."""

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
            states=owned,
            entries=_Entries.of(owned),
            tails=np.stack([state.tail for state in owned]),
            allowed=[np.array(p.allowed, np.int64) for p in processors],
            word_owner=np.array([owner for owner, _ in words], np.int64),
            word_start=starts,
            word_last=np.array([word[-1] for _, word in words], np.int64),
            withheld_owner=np.array([owner for owner, _, _ in held], np.int64),
            withheld=np.array([token for _, token, _ in held], np.int64),
            withheld_until=np.array([until for _, _, until in held], np.int64),
            spelt={n: s.words for n, s in enumerate(owned) if s.words is not None},
        )
        for owner, state in enumerate(owned):
            state.tail = batch.tails[owner]
        return batch

    @cached_property
    def owners(self) -> dict[int, int]:
        """Index among the E of each row with processors."""
        return {row: owner for owner, row in enumerate(self.rows.tolist())}

    def apply(self, logits: Floats, positions: Ints) -> Doubles:
        """A changed copy of `logits[B, V]`, from which the tokens at `positions[B]` are drawn.

        Only for small vocabularies.
        """
        changed = logits.astype(np.float64)
        ours = self.entries.apply(changed[self.rows].ravel()).reshape(-1, logits.shape[1])
        if len(self.word_last):
            start = self.word_start
            complete = ((start == self.tails[self.word_owner]) | (start == _ANY)).all(axis=1)
            ours[self.word_owner[complete], self.word_last[complete]] = -np.inf
        for owner, spelt in self.spelt.items():
            ours[owner, spelt.forbidden()] = -np.inf
        if len(self.withheld):
            early = positions[self.rows][self.withheld_owner] < self.withheld_until
            ours[self.withheld_owner[early], self.withheld[early]] = -np.inf
        changed[self.rows] = ours
        return changed

    def apply_to(self, owner: int, logits: Floats, position: int, out: Doubles) -> Doubles:
        """The same for one of them, `logits[V]` of a large vocabulary, in `out[V]`."""
        begin = int(self.entries.starts[owner])
        used = slice(begin, begin + self.states[owner].size)
        tokens = self.entries.tokens[used]
        if len(allowed := self.allowed[owner]):
            out.fill(-np.inf)
            out[allowed] = logits[allowed]
        else:
            out[:] = logits
        out[tokens] = self.entries.apply(out[tokens], used)
        words = np.flatnonzero(self.word_owner == owner)
        if len(words):
            start = self.word_start[words]
            complete = ((start == self.tails[owner]) | (start == _ANY)).all(axis=1)
            out[self.word_last[words[complete]]] = -np.inf
        if (spelt := self.spelt.get(owner)) is not None:
            out[spelt.forbidden()] = -np.inf
        if len(self.withheld):
            early = (self.withheld_owner == owner) & (position < self.withheld_until)
            out[self.withheld[early]] = -np.inf
        return out

    def remember(self, tokens: Ints) -> None:
        """Add the drawn `tokens[B]` to the penalty states."""
        drawn = tokens[self.rows]
        self.tails[:, :-1] = self.tails[:, 1:]
        self.tails[:, -1] = drawn
        for owner, spelt in self.spelt.items():
            if drawn[owner] >= 0:
                spelt.push(int(drawn[owner]))
        if not len(self.entries.counting):
            return
        owners = self.entries.remember(drawn, self.states[0].vocabulary < LONG_ROW)
        if len(owners) and not self.entries.add(self.states, owners, drawn):
            self.entries = _Entries.of(self.states)
            self.entries.add(self.states, owners, drawn)

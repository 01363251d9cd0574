from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.cache import Cache, Parked
from tests.fakes import FakeRuntime, bare_bundle

SLOTS, CONTEXT = 3, 24
Token = st.integers(0, 255)
Pick = st.integers(0, 1 << 16)


class CacheMachine(RuleBasedStateMachine):
    """Any order of operations, against a list of the tokens that each stream has seen."""

    @initialize(span=st.sampled_from([None, 2, 3, 5, CONTEXT]))
    def open(self, span: int | None) -> None:
        self.bundle = bare_bundle(span, CONTEXT)
        self.runtime = FakeRuntime(self.bundle, SLOTS + 1)
        self.cache = Cache(self.bundle, self.runtime, SLOTS)  # type: ignore[arg-type]
        self.rows: list[list[int]] = []
        self.bench: list[int] | None = None
        self.parked: list[tuple[Parked, list[int]]] = []

    def has_room(self) -> bool:
        return len(self.rows) < SLOTS

    @precondition(has_room)
    @rule()
    def begin(self) -> None:
        assert self.cache.begin() == len(self.rows)
        self.rows.append([])

    @rule()
    def clear_bench(self) -> None:
        self.cache.clear_bench()
        self.bench = []

    @precondition(lambda self: self.bench is not None and len(self.bench) < CONTEXT)
    @rule(tokens=st.lists(Token, min_size=1, max_size=CONTEXT), logits=st.booleans())
    def prefill(self, tokens: list[int], logits: bool) -> None:
        assert self.bench is not None
        span = self.bundle.span or CONTEXT
        room = span - len(self.bench) % span
        assert self.cache.block_room == room
        tokens = tokens[: min(room, CONTEXT - len(self.bench))]
        out = self.cache.prefill(np.array(tokens), logits)
        seen = len(self.bench)
        self.bench += tokens
        assert out[:, 0].tolist() == (list(range(seen + 1, len(self.bench) + 1)) if logits else [])

    @precondition(lambda self: self.bench is not None and self.has_room())
    @rule()
    def join(self) -> None:
        assert self.bench is not None
        assert self.cache.join() == len(self.rows)
        self.rows.append(self.bench)
        self.bench = None

    @precondition(lambda self: self.rows)
    @rule(pick=Pick)
    def leave(self, pick: int) -> None:
        row, last = pick % len(self.rows), len(self.rows) - 1
        assert self.cache.leave(row) == (None if row == last else last)
        moved = self.rows.pop()
        if row != last:
            self.rows[row] = moved

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.rows = []

    @precondition(lambda self: self.rows)
    @rule(pick=Pick)
    def park(self, pick: int) -> None:
        row = pick % len(self.rows)
        self.parked.append((self.cache.park(row), list(self.rows[row])))

    @precondition(lambda self: self.parked and self.has_room())
    @rule(pick=Pick)
    def restore(self, pick: int) -> None:
        parked, history = self.parked[pick % len(self.parked)]
        assert self.cache.restore(parked) == len(self.rows)
        self.rows.append(list(history))

    @precondition(lambda self: self.rows and max(map(len, self.rows)) < CONTEXT)
    @rule(tokens=st.lists(Token, min_size=SLOTS, max_size=SLOTS), ended=Pick)
    def step(self, tokens: list[int], ended: int) -> None:
        ended %= len(self.rows) + 1  # one of the rows, or none
        logits = self.cache.step(np.array(tokens[: len(self.rows)]))
        for row, token in zip(self.rows, tokens, strict=False):
            row.append(token)
        assert logits[:, 0].tolist() == [len(row) for row in self.rows]
        span = self.bundle.span
        due = [
            row
            for row, history in enumerate(self.rows)
            if span and row != ended and len(history) % span == 0
        ]
        assert self.cache.fold({ended}) == len(due)
        if ended < len(self.rows):
            self.leave(ended)

    @invariant()
    def holds_what_every_stream_has_seen(self) -> None:
        cache = self.cache
        assert (cache.num_running, cache.num_free) == (len(self.rows), SLOTS - len(self.rows))
        assert cache.pushed.tolist() == [len(row) for row in self.rows]
        for row, history in enumerate(self.rows):
            assert self.runtime.history(row, self.bundle.entries(len(history))) == history
        if self.bench is not None:
            assert cache.bench_pushed == len(self.bench)
            length = self.bundle.entries(len(self.bench))
            assert self.runtime.history(SLOTS, length) == self.bench


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40)

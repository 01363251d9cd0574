from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from server.checkpoint import SavedState
from server.engine.kv_cache import Cache
from server.runtime.host_state import StateLength
from tests.fakes import FakeRuntime, bare_bundle

SLOTS, CONTEXT = 3, 24


class Streams:
    """Applies random operations to a cache, and keeps the tokens of every stream in a list."""

    def __init__(self, span: int | None, chance: random.Random, binary: bool = False) -> None:
        self.bundle = bare_bundle(span, CONTEXT, binary)
        self.runtime = FakeRuntime(self.bundle, SLOTS + 1)
        self.cache = Cache(self.bundle, self.runtime, SLOTS)  # type: ignore[arg-type]
        self.chance = chance
        self.rows: list[list[int]] = []
        self.prefilling: list[int] | None = None
        self.saved: list[tuple[SavedState, list[int]]] = []

    def possible(self) -> list[Callable[[], None]]:
        """The operations that are possible now; steps and prefill are the most likely."""
        actions = [self.start_prefill]
        if self.prefilling is not None and len(self.prefilling) < CONTEXT:
            actions += [self.prefill] * 4
        if self.rows:
            actions += [self.leave, self.park]
        if self.rows and max(map(len, self.rows)) < CONTEXT:
            actions += [self.step] * 8
        if len(self.rows) < SLOTS:
            actions += [self.begin]
            actions += [self.join] * 2 if self.prefilling is not None else []
            actions += [self.restore] if self.saved else []
        if self.chance.random() < 0.05:
            actions += [self.clear]
        return actions

    def begin(self) -> None:
        assert self.cache.begin() == len(self.rows)
        self.rows.append([])

    def start_prefill(self) -> None:
        self.cache.start_prefill()
        self.prefilling = []

    def prefill(self) -> None:
        assert self.prefilling is not None
        span = self.bundle.span or CONTEXT
        room = span - len(self.prefilling) % span
        assert self.cache.block_room == room
        count = self.chance.randint(1, min(room, CONTEXT - len(self.prefilling)))
        tokens = [self.chance.randrange(256) for _ in range(count)]
        logits = self.chance.random() < 0.5
        out = self.cache.prefill(np.array(tokens), logits)
        seen = len(self.prefilling)
        self.prefilling += tokens
        expected = list(range(seen + 1, len(self.prefilling) + 1)) if logits else []
        assert out[:, 0].tolist() == expected

    def join(self) -> None:
        assert self.prefilling is not None
        assert self.cache.join() == len(self.rows)
        self.rows.append(self.prefilling)
        self.prefilling = None

    def leave(self, row: int | None = None) -> None:
        row = self.chance.randrange(len(self.rows)) if row is None else row
        last = len(self.rows) - 1
        assert self.cache.leave(row) == (None if row == last else last)
        moved = self.rows.pop()
        if row != last:
            self.rows[row] = moved

    def clear(self) -> None:
        self.cache.clear()
        self.rows = []

    def park(self) -> None:
        row = self.chance.randrange(len(self.rows))
        self.saved.append((self.cache.save(row), list(self.rows[row])))

    def restore(self) -> None:
        saved, history = self.chance.choice(self.saved)
        assert self.cache.restore(saved) == len(self.rows)
        self.rows.append(list(history))

    def step(self) -> None:
        tokens = [self.chance.randrange(256) for _ in self.rows]
        logits = self.cache.step(np.array(tokens))
        for history, token in zip(self.rows, tokens, strict=True):
            history.append(token)
        assert logits[:, 0].tolist() == [len(row) for row in self.rows]
        ended = {row for row in range(len(self.rows)) if self.chance.random() < 0.1}
        span = self.bundle.span
        due = [
            row
            for row, history in enumerate(self.rows)
            if span and row not in ended and len(history) % span == 0
        ]
        assert self.cache.fold(ended) == len(due)
        for row in sorted(ended, reverse=True):
            self.leave(row)

    def check(self) -> None:
        """Checks that each stream's state holds exactly the tokens that it pushed."""
        assert self.cache.num_running == len(self.rows)
        assert self.cache.num_free == SLOTS - len(self.rows)
        assert self.cache.pushed.tolist() == [len(row) for row in self.rows]
        for row, history in enumerate(self.rows):
            assert self.runtime.seen(row, self.length(history)) == history
        if self.prefilling is not None:
            assert self.cache.prefill_pushed == len(self.prefilling)
            assert self.runtime.seen(SLOTS, self.length(self.prefilling)) == self.prefilling

    def length(self, history: list[int]) -> StateLength:
        return StateLength(self.bundle.entries(len(history)), len(history))


@pytest.mark.parametrize("span", [None, 2, 3, 5, CONTEXT, "binary"])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_operations_keeps_every_stream(seed: int, span: int | str | None) -> None:
    chance = random.Random(seed)
    streams = Streams(2, chance, True) if isinstance(span, str) else Streams(span, chance)
    for _ in range(150):
        chance.choice(streams.possible())()
        streams.check()


def test_state_bytes_are_those_of_the_batch() -> None:
    streams = Streams(3, random.Random(0))
    heads, entries, width = 2, 10, 4
    shape = [heads, entries, width]
    streams.bundle.manifest.state.add(name="keys", kind=1, shape=shape, data_type=1)
    streams.bundle.manifest.state.add(name="raw", kind=3, shape=[CONTEXT, 5], data_type=1)
    streams.begin()
    streams.begin()
    for token in range(3):
        streams.cache.step(np.array([token, token]))
    streams.cache.fold()
    streams.begin()
    streams.cache.step(np.array([7, 7, 7]))
    entry = heads * width * 4
    assert streams.cache.state_bytes() == {
        "stack": (2 + 2 + 1) * entry,
        "history": (4 + 4 + 1) * 5 * 4,
        "recurrent": 0,
    }

"""Streams that share a batch, at any phase, are independent of each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from server.arrays import Ints
from server.checkpoint import SavedState
from server.runtime.host_state import StateLength
from tests.parity.served import Logits, Served, assert_parity, draw_tokens, expected_logits

SPAN, SLOTS = 8, 4


@dataclass(frozen=True)
class Place:
    """A stream of the simulation: its index in the drawn ones, and its pushed tokens."""

    stream: int
    pushed: int


class Simulation:
    """A random life of a server: streams come, step, fold, are parked, restored, and leave."""

    def __init__(self, served: Served, tokens: Ints, expected: Logits, seed: int) -> None:
        self.served, self.tokens, self.expected = served, tokens, expected
        self.rng = np.random.default_rng(seed)
        self.rows: list[Place] = []
        self.prefilling: Place | None = None
        self.saved: list[tuple[Place, SavedState]] = []
        self.happened: Counter[str] = Counter()

    def run(self, turns: int) -> None:
        actions = (self.begin, self.prefill, self.join, self.park, self.restore, self.leave)
        for _ in range(turns):
            if self.rng.random() < 0.6:
                self.step()
            else:
                actions[self.rng.integers(len(actions))]()

    def begin(self) -> None:
        if self.served.cache.num_free:
            assert self.served.cache.begin() == len(self.rows)
            self.served.poison()
            self.rows.append(self.new())

    def prefill(self) -> None:
        if self.prefilling is None:
            self.served.start_prefill()
            self.prefilling = self.new()
        at = self.prefilling
        part = self.tokens[at.stream, at.pushed :][: self.rng.integers(1, 2 * SPAN)]
        if len(part):
            got = self.served.prefill(part, int(self.rng.integers(1, SPAN + 1)))
            assert_parity(got, self.expected[at.stream, at.pushed :][: len(part)])
            self.prefilling = replace(at, pushed=at.pushed + len(part))

    def join(self) -> None:
        if self.prefilling is not None and self.served.cache.num_free:
            assert self.served.join() == len(self.rows)
            self.rows.append(self.prefilling)
            self.prefilling = None

    def step(self) -> None:
        for row in reversed(range(len(self.rows))):
            if self.rows[row].pushed == self.tokens.shape[1]:
                self.drop(row)
        if not self.rows:
            return
        streams = [at.stream for at in self.rows]
        positions = [at.pushed for at in self.rows]
        ended = tuple(row for row in range(len(self.rows)) if self.rng.random() < 0.02)
        got = self.served.step(self.tokens[streams, positions], ended)
        assert_parity(got, self.expected[streams, positions])
        self.rows = [replace(at, pushed=at.pushed + 1) for at in self.rows]
        full = sum(at.pushed % SPAN == 0 for at in self.rows)
        self.happened["one of several folds"] += 0 < full < len(self.rows)
        self.happened["two fold at once"] += full > 1
        for row in reversed(ended):
            self.drop(row)

    def park(self) -> None:
        if self.rows:
            row = int(self.rng.integers(len(self.rows)))
            self.happened["parked in mid-block"] += self.rows[row].pushed % SPAN > 0
            self.saved.append((self.rows[row], self.served.cache.save(row)))
            self.drop(row)

    def restore(self) -> None:
        if self.saved and self.served.cache.num_free:
            at, saved = self.saved[self.rng.integers(len(self.saved))]
            assert self.served.cache.restore(saved) == len(self.rows)
            self.served.poison()
            self.rows.append(at)
            self.happened["restored"] += 1

    def leave(self) -> None:
        if self.rows and self.rng.random() < 0.5:
            self.drop(int(self.rng.integers(len(self.rows))))

    def drop(self, row: int) -> None:
        moved = self.served.cache.leave(row)
        last = self.rows.pop()
        assert moved == (None if row == len(self.rows) else len(self.rows))
        if moved is not None:
            self.rows[row] = last
            self.happened["moved in mid-block"] += last.pushed % SPAN > 0
        self.served.poison()

    def new(self) -> Place:
        return Place(int(self.rng.integers(len(self.tokens))), 0)


@pytest.mark.parametrize(("seed", "folded_bytes"), [(0, 8 << 20), (1, 8 << 20), (2, 1)])
def test_any_order_of_operations(
    bundle: Path, seed: int, folded_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folds of one size run together or one after the other."""
    monkeypatch.setattr("server.runtime.host_state.FOLDED_BYTES", folded_bytes)
    monkeypatch.setattr("server.runtime.host_state.KEPT_BYTES", 4 * folded_bytes)
    tokens = draw_tokens(bundle, 5)
    life = Simulation(Served(bundle, SLOTS), tokens, expected_logits(bundle, tokens), seed)
    life.run(turns=600)
    assert life.happened["one of several folds"] > 20
    assert life.happened["moved in mid-block"] > 20
    assert life.happened["parked in mid-block"] > 10
    assert life.happened["restored"] > 10
    assert life.happened["two fold at once"] > 3


@pytest.fixture
def mixed(fixed_bundle: Path) -> Served:
    """Four streams, of which only the second fills its block with the next token."""
    served = Served(fixed_bundle)
    for row, begun in enumerate((3, 2 * SPAN - 1, SPAN, SPAN + 5)):
        served.start_prefill()
        served.prefill(draw_tokens(fixed_bundle, SLOTS)[row, :begun])
        served.join()
    return served


def test_a_fold_leaves_its_neighbours_alone(mixed: Served) -> None:
    tokens = draw_tokens(mixed.bundle.folder, SLOTS)
    mixed.cache.step(tokens[range(SLOTS), mixed.cache.pushed])
    lengths = [
        StateLength(4, 4),
        StateLength(1 + SPAN, 2 * SPAN),
        StateLength(2, SPAN + 1),
        StateLength(7, SPAN + 6),
    ]
    before = [mixed.runtime.read(row, length) for row, length in enumerate(lengths)]
    assert mixed.cache.fold() == 1
    after = [mixed.runtime.read(row, length) for row, length in enumerate(lengths)]
    for row in (0, 2, 3):
        assert all(np.array_equal(before[row][name], after[row][name]) for name in before[row])
    for name in ("keys.0", "values.1"):
        assert np.array_equal(before[1][name][:, 0], after[1][name][:, 0])  # the closed block
        assert not np.array_equal(before[1][name][:, 1], after[1][name][:, 1])
    assert np.array_equal(after[1]["keys.0"][:, 1], before[1]["keys.0"][:, 1:].max(axis=1))
    assert (after[1]["pooled_query.0"] < -1e38).all()


def test_rows_that_ended_are_not_folded(mixed: Served) -> None:
    mixed.cache.step(draw_tokens(mixed.bundle.folder, SLOTS)[range(SLOTS), mixed.cache.pushed])
    full = StateLength(1 + SPAN, 2 * SPAN)
    before = mixed.runtime.read(1, full)
    assert mixed.cache.fold(ended=[1]) == 0
    after = mixed.runtime.read(1, full)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("leaving", range(SLOTS))
def test_the_last_row_takes_the_place_of_one_that_leaves(mixed: Served, leaving: int) -> None:
    bundle = mixed.bundle.folder
    tokens = draw_tokens(bundle, SLOTS)
    expected = expected_logits(bundle, tokens)
    streams = list(range(SLOTS))
    moved = mixed.cache.leave(leaving)
    assert moved == (None if leaving == SLOTS - 1 else SLOTS - 1)
    last = streams.pop()
    if moved is not None:
        streams[leaving] = last
    mixed.poison()
    for _ in range(SPAN + 2):
        at = mixed.cache.pushed
        assert_parity(mixed.step(tokens[streams, at]), expected[streams, at])


def test_the_prefill_slot_fills_while_the_batch_decodes(fixed_bundle: Path) -> None:
    tokens = draw_tokens(fixed_bundle, 2)
    expected = expected_logits(fixed_bundle, tokens)
    served = Served(fixed_bundle)
    served.cache.begin()
    served.start_prefill()
    for first in range(0, 30, 3):
        assert_parity(served.prefill(tokens[1, first : first + 3]), expected[1, first : first + 3])
        assert_parity(served.step(tokens[:1, first // 3]), expected[:1, first // 3])


def test_a_new_stream_is_independent_of_the_one_before(fixed_bundle: Path) -> None:
    """Above all of its query maximum: the stream before leaves in mid-block."""
    tokens = draw_tokens(fixed_bundle, 2)
    expected = expected_logits(fixed_bundle, tokens)
    for poison in (0.0, np.nan):
        served = Served(fixed_bundle, slots=1, poison=poison)
        for row in (0, 1):
            served.cache.begin()
            got = served.decode(tokens[row : row + 1, : 12 - row])
            assert_parity(got, expected[row : row + 1, : 12 - row])
            served.cache.leave(0)
            served.cache.start_prefill()
            for first, last in ((0, SPAN), (SPAN, SPAN + 4)):
                got = served.cache.prefill(tokens[row, first:last], logits=True)
                assert_parity(got, expected[row, first:last])

"""Stand-ins small enough to be seen through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from concertina.v1 import bundle_pb2 as pb
from server.arrays import Floats, Ints
from server.bundles.bundle import Bundle
from server.runtime.host_state import StateLength

_DEAD = ("dead",)


def bare_bundle(span: int | None, context: int, binary: bool = False) -> Bundle:
    """A bundle of bytes without any file: enough for whoever only asks for its numbers."""
    manifest = pb.Manifest(name="bare", vocabulary=256, context=context)
    if span is not None:
        manifest.fold.span, manifest.fold.binary = span, binary
    return Bundle(Path("nowhere"), manifest)


class FakeRuntime:
    """A runtime whose entries and rows are the tokens themselves, and whose summaries are spans.

    Whatever nobody may read any more is marked dead, so that reading it shows.
    """

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self.stacks: list[list[tuple[Any, ...]]] = [[_DEAD] * bundle.context for _ in range(rows)]
        self.histories: list[list[Any]] = [[_DEAD] * bundle.context for _ in range(rows)]
        self.recurrent: list[tuple[Any, ...]] = [_DEAD] * rows  # here: all tokens so far

    def seen(self, row: int, extent: StateLength) -> list[int]:
        """The tokens that a row stands for, all three kinds of state agreeing."""
        tokens = [token for entry in self.stacks[row][: extent.entries] for token in entry]
        assert tokens == self.histories[row][: extent.tokens] == list(self.recurrent[row])
        return tokens

    def step(self, tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        """Logits `[B, 1]` are the number of tokens seen."""
        for row, place in enumerate(zip(tokens, positions, lengths, strict=True)):
            self._push(row, *map(int, place))
        return (positions[:, None] + 1).astype(np.float32)

    def prefill(
        self, row: int, tokens: Ints, position: int, length: int, logits: bool = False
    ) -> Floats:
        """As `step`, for one row."""
        for index, token in enumerate(tokens):
            self._push(row, token, position + index, length + index)
        seen = np.arange(position + 1, position + 1 + len(tokens))[:, None]
        return seen.astype(np.float32) if logits else np.zeros((0, 1), np.float32)

    def _push(self, row: int, token: int, position: int, length: int) -> None:
        assert len(self.seen(row, StateLength(length, position))) == position
        self.stacks[row][length:] = [(token,), *[_DEAD] * (len(self.stacks[row]) - length - 1)]
        self.histories[row][position] = token
        self.recurrent[row] += (token,)

    def fold(
        self, rows: Sequence[int], begins: Sequence[StateLength], ends: Sequence[StateLength]
    ) -> None:
        """The entries between two extents become one, which stands for the rows between them."""
        pairs = zip(begins, ends, strict=True)
        assert len({(e.entries - b.entries, e.tokens - b.tokens) for b, e in pairs}) == 1
        for row, begin, end in zip(rows, begins, ends, strict=True):
            taken = self.stacks[row][begin.entries : end.entries]
            assert len(taken) > 1
            summary = tuple(token for entry in taken for token in entry)
            assert list(summary) == self.histories[row][begin.tokens : end.tokens]
            dead = [_DEAD] * (len(taken) - 1)
            self.stacks[row][begin.entries : end.entries] = [summary, *dead]

    def reset(self, row: int) -> None:
        """As the real one: what may not be read may stay."""
        self.recurrent[row] = ()

    def move(self, source: int, target: int, extent: StateLength) -> None:
        """The source dies."""
        self.write(target, extent, self.read(source, extent))
        self.stacks[source] = [_DEAD] * len(self.stacks[source])
        self.histories[source] = [_DEAD] * len(self.histories[source])
        self.recurrent[source] = _DEAD

    def read(self, row: int, end: StateLength) -> dict[str, Any]:
        """What `write` takes."""
        return {
            "stack": self.stacks[row][: end.entries],
            "history": self.histories[row][: end.tokens],
            "recurrent": self.recurrent[row],
        }

    def write(self, row: int, extent: StateLength, state: dict[str, Any]) -> None:
        """What `read` gave."""
        size = len(self.stacks[row])
        self.stacks[row] = [*state["stack"], *[_DEAD] * (size - extent.entries)]
        self.histories[row] = [*state["history"], *[_DEAD] * (size - extent.tokens)]
        self.recurrent[row] = state["recurrent"]

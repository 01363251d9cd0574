"""Stand-ins small enough to be seen through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from concertina.v1 import bundle_pb2 as pb
from server.bundle import Bundle
from server.runtime import Floats, Ints

_DEAD = ("dead",)


def bare_bundle(span: int | None, context: int) -> Bundle:
    """A bundle of bytes without any file: enough for whoever only asks for its numbers."""
    manifest = pb.Manifest(name="bare", vocabulary=256, context=context)
    if span is not None:
        manifest.fold.span = span
    return Bundle(Path("nowhere"), manifest)


class FakeRuntime:
    """A runtime whose entries are the tokens themselves, and whose summaries are whole blocks.

    Whatever nobody may read any more is marked dead, so that reading it shows.
    """

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self._span = bundle.span
        self.stacks: list[list[tuple[Any, ...]]] = [[_DEAD] * bundle.context for _ in range(rows)]
        self.unfolded: list[tuple[Any, ...]] = [_DEAD] * rows  # what a recurrent tensor would hold

    def history(self, row: int, length: int) -> list[int]:
        """The tokens that `length` entries of a row stand for."""
        return [token for entry in self.stacks[row][:length] for token in entry]

    def step(self, tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        """Logits `[B, 1]` are the number of tokens seen."""
        for row, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
            self._push(row, int(token), int(length))
            assert len(self.history(row, int(length) + 1)) == positions[row] + 1
        return (positions[:, None] + 1).astype(np.float32)

    def prefill(
        self, row: int, tokens: Ints, position: int, length: int, logits: bool = False
    ) -> Floats:
        """As `step`, for one row."""
        assert len(self.history(row, length)) == position
        for index, token in enumerate(tokens):
            self._push(row, int(token), length + index)
        seen = np.arange(position + 1, position + 1 + len(tokens))[:, None]
        return seen.astype(np.float32) if logits else np.zeros((0, 1), np.float32)

    def _push(self, row: int, token: int, length: int) -> None:
        self.stacks[row][length] = (token,)
        self.stacks[row][length + 1 :] = [_DEAD] * len(self.stacks[row][length + 1 :])
        self.unfolded[row] += (token,)

    def fold(self, rows: Sequence[int], bases: Sequence[int]) -> None:
        """A block of single tokens becomes one entry."""
        assert self._span is not None
        for row, base in zip(rows, bases, strict=True):
            block = self.stacks[row][base : base + self._span]
            assert [len(entry) for entry in block] == [1] * self._span
            summary = tuple(token for entry in block for token in entry)
            assert self.unfolded[row] == summary
            self.stacks[row][base : base + self._span] = [summary, *[_DEAD] * (self._span - 1)]
            self.unfolded[row] = ()

    def reset(self, row: int) -> None:
        """As the real one: dead entries stay."""
        self.unfolded[row] = ()

    def move(self, source: int, target: int, length: int) -> None:
        """The source dies."""
        self.write(target, self.read(source, length))
        self.stacks[source] = [_DEAD] * len(self.stacks[source])
        self.unfolded[source] = _DEAD

    def read(self, row: int, length: int) -> dict[str, Any]:
        """What `write` takes."""
        return {"stack": self.stacks[row][:length], "unfolded": self.unfolded[row]}

    def write(self, row: int, state: dict[str, Any]) -> None:
        """What `read` gave."""
        dead = [_DEAD] * (len(self.stacks[row]) - len(state["stack"]))
        self.stacks[row] = [*state["stack"], *dead]
        self.unfolded[row] = state["unfolded"]

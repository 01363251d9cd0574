"""The books over the runtime's rows: which stream has which, how far each is, and what folds.

Rows `0 … len(pushed) - 1` are the batch, kept dense. One more row behind the last is the prefill
slot, where one stream at a time pushes its prompt before it joins the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from server.arrays import Floats, Ints, State
from server.bundles.bundle import Bundle
from server.checkpoint import SavedState
from server.engine.prefix_cache import PrefixCache
from server.runtime.host_state import StateLength
from server.runtime.onnx_session import Runtime

_NEVER = np.iinfo(np.int64).max


class Cache:
    """State of up to `slots` decoding streams and one being prefilled."""

    def __init__(self, bundle: Bundle, runtime: Runtime, slots: int, prefix_bytes: int = 0) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._slots = slots
        self._prefill_row = slots
        self._prefill_pushed = 0
        self._open_block: Ints = np.zeros(0, np.int64)  # tokens of it, while prefixes are kept
        self._interval = bundle.span or _NEVER
        self._prefixes: PrefixCache | None = None
        if bundle.span and bundle.shares_blocks and prefix_bytes:
            self._prefixes = PrefixCache(bundle.span, prefix_bytes)
        self._pushed: Ints = np.zeros(0, np.int64)
        self._before: State = {}  # what `commit` may have to put back

    @property
    def num_running(self) -> int:
        """Streams in the batch."""
        return len(self._pushed)

    @property
    def num_free(self) -> int:
        """Streams that can still join the batch."""
        return self._slots - self.num_running

    @property
    def pushed(self) -> Ints:
        """Tokens each stream of the batch has seen, `[B]`."""
        return self._pushed

    @property
    def prefill_pushed(self) -> int:
        """Tokens the stream in the prefill slot has seen."""
        return self._prefill_pushed

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the blocks that are kept for prompts which begin alike."""
        return 0 if self._prefixes is None else self._prefixes.nbytes

    def state_bytes(self) -> dict[str, int]:
        """Bytes of live state by kind, over the batch."""
        return self._bundle.total_state_bytes(self._pushed)

    # ---- the prefill slot

    @property
    def block_room(self) -> int:
        """Tokens the stream in the prefill slot takes before its block is full."""
        return self._room(self.prefill_pushed)

    def start_prefill(self, inputs: Ints | None = None) -> None:
        """Give the prefill slot to a stream that has not begun.

        If its `inputs[T]` are given, the blocks that an earlier prompt began with count as pushed.
        """
        self._runtime.reset(self._prefill_row)
        self._prefill_pushed, self._open_block = 0, np.zeros(0, np.int64)
        if self._prefixes is None:
            return
        blocks = self._prefixes.match(self._open_block if inputs is None else inputs)
        if blocks:
            self._prefill_pushed = len(blocks) * (self._bundle.span or 0)
            stacks = {
                name: np.concatenate([block[name] for block in blocks], axis=1)
                for name in self._bundle.stacks
            }
            self._runtime.write(self._prefill_row, self._length(self.prefill_pushed), stacks)

    def resume_prefill(self, inputs: Ints, saved: SavedState) -> None:
        """Give the prefill slot to a stream that has pushed the first of its `inputs[T]`."""
        self._prefill_pushed = saved.pushed
        if self._prefixes is not None:
            blocks, rest = divmod(saved.pushed, self._bundle.span or 1)
            self._prefixes.follow(inputs[: saved.pushed], blocks)
            self._open_block = inputs[saved.pushed - rest : saved.pushed]
        self._runtime.write(self._prefill_row, self._length(saved.pushed), saved.state)

    def prefill(self, tokens: Ints, logits: bool = False) -> Floats:
        """Push `tokens[T]`, at most `block_room`, for the stream in the prefill slot."""
        assert len(tokens) <= self.block_room
        entries = self._bundle.entries(self.prefill_pushed)
        out = self._runtime.prefill(self._prefill_row, tokens, self.prefill_pushed, entries, logits)
        self._prefill_pushed += len(tokens)
        is_due = self.prefill_pushed % self._interval == 0
        if is_due:
            self._fold([self._prefill_row], [self.prefill_pushed])
        if self._prefixes is None:
            return out
        self._open_block = np.concatenate((self._open_block, tokens))
        if is_due:
            end = self._length(self.prefill_pushed)
            begin = StateLength(end.entries - 1, end.tokens)
            entry = self._runtime.read(self._prefill_row, end, begin)
            stacks = {name: entry[name] for name in self._bundle.stacks}
            self._prefixes.insert(self._open_block, stacks)
            self._open_block = self._open_block[:0]
        return out

    def join(self) -> int:
        """Move the stream in the prefill slot into the batch; returns its row."""
        row = self._append(self.prefill_pushed)
        self._runtime.move(self._prefill_row, row, self._length(self.prefill_pushed))
        return row

    def save_prefill(self) -> SavedState:
        """A copy of the state in the prefill slot."""
        pushed = self.prefill_pushed
        return SavedState(self._runtime.read(self._prefill_row, self._length(pushed)), pushed)

    # ---- the batch

    def begin(self) -> int:
        """Add a stream that has not begun to the batch; returns its row."""
        row = self._append(0)
        self._runtime.reset(row)
        return row

    def restore(self, saved: SavedState) -> int:
        """Add a stream to the batch whose state was saved; returns its row."""
        row = self._append(saved.pushed)
        self._runtime.write(row, self._length(saved.pushed), saved.state)
        return row

    def save(self, row: int) -> SavedState:
        """A copy of a stream's state; the stream itself stays where it is."""
        pushed = int(self._pushed[row])
        return SavedState(self._runtime.read(row, self._length(pushed)), pushed)

    def leave(self, row: int) -> int | None:
        """Take a stream out of the batch. The last row, if another, moves in: its old number."""
        last = self.num_running - 1
        if row != last:
            self._runtime.move(last, row, self._length(int(self._pushed[last])))
            self._pushed[row] = self._pushed[last]
        self._pushed = self._pushed[:last]
        return last if row != last else None

    def clear(self) -> None:
        """Take every stream out of the batch."""
        self._pushed = self._pushed[:0]

    def step(self, tokens: Ints) -> Floats:
        """Push `tokens[B]`, one for each stream of the batch; logits `[B, vocabulary]`.

        The blocks that this fills stay open until `fold`.
        """
        logits = self._runtime.step(tokens, self._pushed, self._bundle.entries(self._pushed))
        self._pushed = self._pushed + 1
        return logits

    def fold(self, ended: Collection[int] = ()) -> int:
        """Fold the blocks that the last step filled, but not those of rows that ended; how many."""
        due = np.flatnonzero(self._pushed % self._interval == 0).tolist()
        rows = [row for row in due if row not in ended]
        self._fold(rows, self._pushed[rows].tolist())
        return len(rows)

    # ---- several tokens at once, for the only stream of the batch

    @property
    def row_room(self) -> int:
        """Tokens that the only stream of the batch takes before its block is full."""
        return self._room(int(self._pushed[0]))

    def push_ahead(self, tokens: Ints, logits: bool = True) -> Floats:
        """Push `tokens[T]`, at most `row_room`, onto the only stream of the batch.

        Returns logits `[T, vocabulary]`. Until `commit`, none of the tokens counts as pushed.
        """
        assert self.num_running == 1 and len(tokens) <= self.row_room
        pushed = int(self._pushed[0])
        here = self._length(pushed)
        self._before = self._runtime.read(0, here, here)
        return self._runtime.prefill(0, tokens, pushed, here.entries, logits)

    def commit(self, count: int, of: int) -> int:
        """Keep the first `count` of the `of` tokens that were pushed ahead; how many are kept.

        Where the state cannot be wound back to the middle it is all or none of them.
        """
        if count < of and self._bundle.recurrent:
            replaced = {name: self._before[name] for name in self._bundle.recurrent}
            self._runtime.write(0, self._length(int(self._pushed[0])), replaced)
            return 0
        self._pushed = self._pushed + count
        return count

    # ---- arithmetic

    def _append(self, pushed: int) -> int:
        assert self.num_free > 0
        self._pushed = np.append(self._pushed, pushed)
        return self.num_running - 1

    def _fold(self, rows: Sequence[int], pushed: Sequence[int]) -> None:
        by_size: dict[tuple[int, int], list[tuple[int, StateLength, StateLength]]] = {}
        for row, tokens in zip(rows, pushed, strict=True):
            entries, history = size = self._bundle.fold_size(tokens)
            end = StateLength(self._bundle.entries(tokens - 1) + 1, tokens)
            begin = StateLength(end.entries - entries, tokens - history)
            by_size.setdefault(size, []).append((row, begin, end))
        for parts in by_size.values():
            self._runtime.fold(*zip(*parts, strict=True))

    def _room(self, pushed: int) -> int:
        if self._bundle.span is None:
            return self._bundle.context - pushed
        return self._bundle.span - pushed % self._bundle.span

    def _length(self, pushed: int) -> StateLength:
        return StateLength(self._bundle.entries(pushed), pushed)

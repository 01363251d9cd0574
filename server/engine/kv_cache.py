"""Manages the rows of the runtime: how many tokens each row has pushed, and when it folds.

Rows `0 … len(pushed) - 1` are the batch, without gaps. A row after the slots is the prefill slot,
where one stream at a time pushes its prompt before it joins the batch. If the bundle pairs rows,
the row after an odd batch and the row after the prefill slot are never in use. State is copied
before a row counts as taken or free: where a copy raises, the batch is as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from server.arrays import Floats, Ints, State
from server.bundles.bundle import Bundle
from server.checkpoint import SavedState
from server.engine.prefix_cache import PrefixCache, added, joined
from server.runtime.host_state import StateLength
from server.runtime.onnx_session import Runtime

_NEVER = np.iinfo(np.int64).max


def prefill_row(bundle: Bundle, slots: int) -> int:
    """The row of the prefill slot, after those of `slots` streams in the batch."""
    return slots + slots % 2 if bundle.pairs_rows else slots


def num_rows(bundle: Bundle, slots: int) -> int:
    """Number of rows that the runtime needs for `slots` streams in the batch."""
    return prefill_row(bundle, slots) + (2 if bundle.pairs_rows else 1)


class Cache:
    """The state of up to `slots` streams in the batch and of one in the prefill slot."""

    def __init__(self, bundle: Bundle, runtime: Runtime, slots: int, prefix_bytes: int = 0) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._slots = slots
        self._prefill_row = prefill_row(bundle, slots)
        self._prefill_pushed = 0
        self._prefill_looked_up = 0
        self._open_block: Ints = np.zeros(0, np.int64)  # its tokens, if prefixes are cached
        self._interval = bundle.span or _NEVER
        self._prefixes: PrefixCache | None = None
        if bundle.span and bundle.shares_blocks and prefix_bytes:
            self._prefixes = PrefixCache(bundle.span, prefix_bytes)
        self._pushed: Ints = np.zeros(0, np.int64)
        self._before: State = {}  # recurrent state that `commit` puts back

    @property
    def num_running(self) -> int:
        """Number of streams in the batch."""
        return len(self._pushed)

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return self._slots - self.num_running

    @property
    def pushed(self) -> Ints:
        """Number of tokens that each stream of the batch has pushed, `[B]`."""
        return self._pushed

    @property
    def prefill_pushed(self) -> int:
        """Number of tokens that the stream in the prefill slot has pushed."""
        return self._prefill_pushed

    @property
    def prefill_looked_up(self) -> int:
        """Tokens of the prompt in the prefill slot that were looked up in the prefix cache."""
        return self._prefill_looked_up

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix cache."""
        return 0 if self._prefixes is None else self._prefixes.nbytes

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the batch's state by kind of tensor."""
        return self._bundle.total_state_bytes(self._pushed)

    # ---- the prefill slot

    @property
    def block_room(self) -> int:
        """Number of tokens that the stream in the prefill slot can push until its block is full."""
        return self._room(self.prefill_pushed)

    def prefill_room(self, limit: int) -> int:
        """Most tokens that the next pass of the prefill slot may push, of at most `limit`.

        If the bundle pairs rows, the limit must change no last bit. Where there are blocks, a pass
        is a whole one, since some patterns add up its tokens. Elsewhere it has an even number of
        tokens, at least 2: two or more tokens of a pass get the same bits, one alone gets others.
        """
        if not self._bundle.pairs_rows:
            return min(self.block_room, limit)
        if self._bundle.span is not None:
            return self.block_room
        return min(self.block_room, max(2, limit - limit % 2))

    def start_prefill(self, inputs: Ints | None = None) -> None:
        """Give the prefill slot to a new stream.

        With `inputs[T]`, the blocks at their beginning that the prefix cache has are copied and
        count as pushed.
        """
        self._runtime.reset(self._prefill_row)
        self._prefill_pushed, self._open_block = 0, np.zeros(0, np.int64)
        self._prefill_looked_up = 0
        if self._prefixes is None:
            return
        self._prefill_looked_up = 0 if inputs is None else len(inputs)
        blocks = self._prefixes.match(self._open_block if inputs is None else inputs)
        if blocks:
            span = self._bundle.span or 0
            self._prefill_pushed = len(blocks) * span
            stacks = {
                tensor.name: joined(
                    [block[tensor.name] for block in blocks],
                    span,
                    self._bundle.folded_blocks(self.prefill_pushed, tensor.kept),
                )
                for tensor in self._bundle.state
                if tensor.name in self._bundle.stacks
            }
            self._runtime.write(self._prefill_row, self._length(self.prefill_pushed), stacks)

    def resume_prefill(self, inputs: Ints, saved: SavedState) -> None:
        """Give the prefill slot to a stream whose `saved` state has some of its `inputs[T]`."""
        self._prefill_pushed = saved.pushed
        self._prefill_looked_up = 0
        if self._prefixes is not None:
            blocks, rest = divmod(saved.pushed, self._bundle.span or 1)
            # Some of these tokens may have been pushed one by one, which prompts are not: where
            # that makes a difference, other prompts must not get blocks that depend on them.
            known = _NEVER if self._bundle.pairs_rows else blocks
            self._prefixes.resume(inputs[: saved.pushed], known)
            self._open_block = inputs[saved.pushed - rest : saved.pushed]
        self._runtime.write(self._prefill_row, self._length(saved.pushed), saved.state)

    def prefill(self, tokens: Ints, logits: bool = False) -> Floats:
        """Push `tokens[T]`, at most `block_room`, for the stream in the prefill slot.

        Returns `[T, vocabulary]` if `logits` is true, else `[0, vocabulary]`.
        """
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
            self._prefixes.insert(self._open_block, self._newest_block())
            self._open_block = self._open_block[:0]
        return out

    def _newest_block(self) -> State:
        """What the block adds to each stack that has just become full in the prefill slot."""
        bundle, end = self._bundle, self._length(self.prefill_pushed)
        fold, span = bundle.manifest.fold, bundle.span or 0
        folded = bool(bundle.folded_blocks(self.prefill_pushed))
        stays = span if fold.keep_newest or not folded else 0
        begin = StateLength(
            end.entries - (1 + fold.keep_newest * span if folded else span),
            end.tokens - span,
            end.windowed - stays,
        )
        part = self._runtime.read(self._prefill_row, end, begin)
        return {
            tensor.name: added(part[tensor.name], span, folded and tensor.kept == 1)
            for tensor in bundle.state
            if tensor.name in bundle.stacks
        }

    def join(self) -> int:
        """Move the stream in the prefill slot into the batch. Returns its row."""
        row = self._next_row
        self._runtime.move(self._prefill_row, row, self._length(self.prefill_pushed))
        return self._append(self.prefill_pushed)

    def save_prefill(self) -> SavedState:
        """A copy of the state in the prefill slot."""
        pushed = self.prefill_pushed
        return SavedState(self._runtime.read(self._prefill_row, self._length(pushed)), pushed)

    # ---- the batch

    def begin(self) -> int:
        """Add a new stream to the batch. Returns its row."""
        row = self._next_row
        self._runtime.reset(row)
        return self._append(0)

    def restore(self, saved: SavedState) -> int:
        """Add a stream with a saved state to the batch. Returns its row."""
        row = self._next_row
        self._runtime.write(row, self._length(saved.pushed), saved.state)
        return self._append(saved.pushed)

    def save(self, row: int) -> SavedState:
        """A copy of the state in a row of the batch. The stream stays in the batch."""
        pushed = int(self._pushed[row])
        return SavedState(self._runtime.read(row, self._length(pushed)), pushed)

    def leave(self, row: int) -> int | None:
        """Remove a row from the batch. The last row moves into the gap.

        Returns the old number of the row that moves; None if none does. If the move raises, the
        row stays in the batch, and its state is lost.
        """
        last = self.num_running - 1
        if row != last:
            self._runtime.move(last, row, self._length(int(self._pushed[last])))
            self._pushed[row] = self._pushed[last]
        self._pushed = self._pushed[:last]
        return last if row != last else None

    def clear(self) -> None:
        """Remove all rows from the batch."""
        self._pushed = self._pushed[:0]

    def step(self, tokens: Ints) -> Floats:
        """Push `tokens[B]`, one for each row of the batch. Returns logits `[B, vocabulary]`.

        Blocks that become full stay open until `fold`.
        """
        logits = self._runtime.step(tokens, self._pushed, self._bundle.entries(self._pushed))
        self._pushed = self._pushed + 1
        return logits

    def fold(self, ended: Collection[int] = ()) -> int:
        """Fold the blocks that the last step filled, except in `ended` rows. Returns how many."""
        due = np.flatnonzero(self._pushed % self._interval == 0).tolist()
        rows = [row for row in due if row not in ended]
        if not rows:
            return 0
        return self._fold(rows, self._pushed[rows].tolist())

    # ---- several tokens at once, for a batch of one stream

    @property
    def row_room(self) -> int:
        """Number of tokens that the only stream of the batch can push until its block is full."""
        return self._room(int(self._pushed[0]))

    def push_ahead(self, tokens: Ints, logits: bool = True) -> Floats:
        """Push `tokens[T]`, at most `row_room`, for the only stream of the batch.

        Returns logits `[T, vocabulary]`. No token counts as pushed before `commit`.
        """
        assert self.num_running == 1 and len(tokens) <= self.row_room
        pushed = int(self._pushed[0])
        here = self._length(pushed)
        self._before = self._runtime.read(0, here, here)
        return self._runtime.prefill(0, tokens, pushed, here.entries, logits)

    def commit(self, count: int, of: int) -> int:
        """Keep the first `count` of the `of` tokens pushed ahead. Returns how many are kept.

        A recurrent state cannot go back to a token in the middle: if `count` is less than `of`, it
        keeps none.
        """
        if count < of and self._bundle.recurrent:
            replaced = {name: self._before[name] for name in self._bundle.recurrent}
            self._runtime.write(0, self._length(int(self._pushed[0])), replaced)
            return 0
        self._pushed = self._pushed + count
        return count

    # ---- arithmetic

    @property
    def _next_row(self) -> int:
        assert self.num_free > 0
        return self.num_running

    def _append(self, pushed: int) -> int:
        self._pushed = np.append(self._pushed, pushed)
        return self.num_running - 1

    def _fold(self, rows: Sequence[int], pushed: Sequence[int]) -> int:
        """Fold rows whose block is full, after `pushed` tokens each. Returns how many are due."""
        by_size: dict[tuple[int, int], list[tuple[int, StateLength, StateLength]]] = {}
        for row, tokens in zip(rows, pushed, strict=True):
            entries, history = size = self._bundle.fold_size(tokens)
            if not entries:  # a block that stays as it is
                continue
            end = StateLength(
                self._bundle.entries(tokens - 1) + 1,
                tokens,
                self._bundle.entries(tokens - 1, 0) + 1,
            )
            begin = StateLength(end.entries - entries, tokens - history, end.windowed - entries)
            by_size.setdefault(size, []).append((row, begin, end))
        for parts in by_size.values():
            self._runtime.fold(*zip(*parts, strict=True))
        return sum(map(len, by_size.values()))

    def _room(self, pushed: int) -> int:
        if self._bundle.span is None:
            return self._bundle.context - pushed
        return self._bundle.span - pushed % self._bundle.span

    def _length(self, pushed: int) -> StateLength:
        entries = self._bundle.entries
        return StateLength(entries(pushed), pushed, entries(pushed, 0))

"""The books over the runtime's rows: who sits where, how far each is, and when a block folds.

Rows `0 … len(positions) - 1` are the batch, kept dense. One more row behind the last slot is the
bench, where one stream at a time is prefilled before it joins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from server.bundles.bundle import Bundle
from server.engine.prefix_cache import PrefixCache
from server.runtime.host_state import Extent, State
from server.runtime.onnx_session import Floats, Ints, Runtime

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Parked:
    """A stream's state outside any slot, and the number of tokens it has seen."""

    state: State
    pushed: int


class Cache:
    """State of up to `slots` decoding streams and one being prefilled."""

    def __init__(self, bundle: Bundle, runtime: Runtime, slots: int, prefix_bytes: int = 0) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._slots = slots
        self._bench = slots
        self._bench_pushed = 0
        self._open_block: Ints = np.zeros(0, np.int64)  # tokens of it, while prefixes are kept
        self._interval = bundle.span or _NEVER
        self._prefixes: PrefixCache | None = None
        if bundle.span and bundle.shares_blocks and prefix_bytes:
            self._prefixes = PrefixCache(bundle.span, prefix_bytes)
        self._pushed: Ints = np.zeros(0, np.int64)
        self._before: State = {}  # what `keep` may have to put back

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
    def bench_pushed(self) -> int:
        """Tokens the stream on the bench has seen."""
        return self._bench_pushed

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the blocks that are kept for prompts which begin alike."""
        return self._prefixes.nbytes if self._prefixes else 0

    @property
    def block_room(self) -> int:
        """Tokens the bench takes before its block is full."""
        if self._bundle.span is None:
            return self._bundle.context - self.bench_pushed
        return self._bundle.span - self.bench_pushed % self._bundle.span

    def state_bytes(self) -> dict[str, int]:
        """Bytes of live state by kind, over the batch."""
        return self._bundle.total_state_bytes(self._pushed)

    def resume(self, prompt: Ints, parked: Parked) -> None:
        """Put a stream on the bench that was parked when its `prompt[T]` was not all pushed."""
        self._bench_pushed = parked.pushed
        if self._prefixes is not None:
            blocks, rest = divmod(parked.pushed, self._bundle.span or 1)
            self._prefixes.follow(prompt[: parked.pushed], blocks)
            self._open_block = prompt[parked.pushed - rest : parked.pushed]
        self._runtime.write(self._bench, self._extent(parked.pushed), parked.state)

    def seat(self, prompt: Ints | None = None) -> None:
        """Make room on the bench for a stream that has not begun.

        Of its `prompt[T]`, if given, the blocks that an earlier prompt began with count as pushed.
        """
        self._runtime.reset(self._bench)
        self._bench_pushed, self._open_block = 0, np.zeros(0, np.int64)
        if self._prefixes is None:
            return
        blocks = self._prefixes.match(self._open_block if prompt is None else prompt)
        if blocks:
            self._bench_pushed = len(blocks) * (self._bundle.span or 0)
            stacks = {
                name: np.concatenate([block[name] for block in blocks], axis=1)
                for name in self._bundle.stacks
            }
            self._runtime.write(self._bench, self._extent(self.bench_pushed), stacks)

    def prefill(self, tokens: Ints, logits: bool = False) -> Floats:
        """Push `tokens[T]`, at most `block_room`, onto the bench."""
        assert len(tokens) <= self.block_room
        length = self._bundle.entries(self.bench_pushed)
        out = self._runtime.prefill(self._bench, tokens, self.bench_pushed, length, logits)
        self._bench_pushed += len(tokens)
        is_due = self.bench_pushed % self._interval == 0
        if is_due:
            self._fold([self._bench], [self.bench_pushed])
        if self._prefixes is None:
            return out
        self._open_block = np.concatenate((self._open_block, tokens))
        if is_due:
            end = self._extent(self.bench_pushed)
            entry = self._runtime.read(self._bench, end, Extent(end.entries - 1, end.tokens))
            stacks = {name: entry[name] for name in self._bundle.stacks}
            self._prefixes.insert(self._open_block, stacks)
            self._open_block = self._open_block[:0]
        return out

    def join(self) -> int:
        """Move the stream from the bench into the batch; returns its row."""
        row = self._append(self.bench_pushed)
        self._runtime.move(self._bench, row, self._extent(self.bench_pushed))
        return row

    def begin(self) -> int:
        """Add a stream that has not begun to the batch; returns its row."""
        row = self._append(0)
        self._runtime.reset(row)
        return row

    def leave(self, row: int) -> int | None:
        """Take a stream out of the batch. The last row, if another, moves in: its old number."""
        last = self.num_running - 1
        if row != last:
            self._runtime.move(last, row, self._extent(int(self._pushed[last])))
            self._pushed[row] = self._pushed[last]
        self._pushed = self._pushed[:last]
        return last if row != last else None

    def clear(self) -> None:
        """Take every stream out of the batch."""
        self._pushed = self._pushed[:0]

    def park(self, row: int) -> Parked:
        """A copy of a stream's state; the stream itself stays where it is."""
        pushed = int(self._pushed[row])
        return Parked(self._runtime.read(row, self._extent(pushed)), pushed)

    def park_bench(self) -> Parked:
        """A copy of the state on the bench."""
        pushed = self.bench_pushed
        return Parked(self._runtime.read(self._bench, self._extent(pushed)), pushed)

    def restore(self, parked: Parked) -> int:
        """Add a parked stream to the batch; returns its row."""
        row = self._append(parked.pushed)
        self._runtime.write(row, self._extent(parked.pushed), parked.state)
        return row

    def step(self, tokens: Ints) -> Floats:
        """Push `tokens[B]`, one for each stream of the batch; logits `[B, vocabulary]`.

        The blocks that this fills stay open until `fold`.
        """
        logits = self._runtime.step(tokens, self._pushed, self._bundle.entries(self._pushed))
        self._pushed = self._pushed + 1
        return logits

    @property
    def row_room(self) -> int:
        """Tokens that the only stream of the batch takes before its block is full."""
        pushed = int(self._pushed[0])
        if self._bundle.span is None:
            return self._bundle.context - pushed
        return self._bundle.span - pushed % self._bundle.span

    def feed(self, tokens: Ints, logits: bool = True) -> Floats:
        """Push `tokens[T]`, at most `row_room`, onto the only stream of the batch.

        Returns logits `[T, vocabulary]`. Until `keep` is called, no token counts as pushed.
        """
        assert self.num_running == 1 and len(tokens) <= self.row_room
        pushed = int(self._pushed[0])
        here = self._extent(pushed)
        self._before = self._runtime.read(0, here, here)
        return self._runtime.prefill(0, tokens, pushed, here.entries, logits)

    def keep(self, count: int, of: int) -> int:
        """The first `count` tokens `of` those that were fed are to stay; how many do.

        It is all or none of them where the state cannot be wound back by half.
        """
        if count < of and self._bundle.recurrent:
            replaced = {name: self._before[name] for name in self._bundle.recurrent}
            self._runtime.write(0, self._extent(int(self._pushed[0])), replaced)
            return 0
        self._pushed = self._pushed + count
        return count

    def fold(self, ended: Collection[int] = ()) -> int:
        """Fold the blocks that the last step filled, but not those of rows that ended; how many."""
        due = np.flatnonzero(self._pushed % self._interval == 0).tolist()
        rows = [row for row in due if row not in ended]
        self._fold(rows, self._pushed[rows].tolist())
        return len(rows)

    def _append(self, pushed: int) -> int:
        assert self.num_free > 0
        self._pushed = np.append(self._pushed, pushed)
        return self.num_running - 1

    def _fold(self, rows: Sequence[int], pushed: Sequence[int]) -> None:
        by_size: dict[tuple[int, int], list[tuple[int, Extent, Extent]]] = {}
        for row, tokens in zip(rows, pushed, strict=True):
            entries, history = size = self._bundle.fold_size(tokens)
            end = Extent(self._bundle.entries(tokens - 1) + 1, tokens)
            begin = Extent(end.entries - entries, tokens - history)
            by_size.setdefault(size, []).append((row, begin, end))
        for places in by_size.values():
            self._runtime.fold(*zip(*places, strict=True))

    def _extent(self, pushed: int) -> Extent:
        return Extent(self._bundle.entries(pushed), pushed)

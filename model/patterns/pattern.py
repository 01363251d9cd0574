"""The interface of a pattern: index sets, the parallel forward, and the state used in decoding.

Shapes: `B` batch, `H` heads, `T` tokens, `D` head_dim, `L` context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Support:
    """What one token attends to: single tokens and whole spans (arXiv 2107.05768, eq. 4)."""

    direct: tuple[int, ...]
    """Omega^0, which includes the token itself."""
    spans: tuple[tuple[int, ...], ...] = ()
    """Omega^1 … Omega^n, oldest first. No span is empty."""

    @classmethod
    def of(cls, direct: Iterable[int], spans: Iterable[Sequence[int]] = ()) -> Support:
        """A Support from any iterables; empty spans are left out."""
        return cls(tuple(direct), tuple(tuple(span) for span in spans if len(span)))


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's decode state, for one stream.

    A `stack` is `[H, entries, D]`, a `history` is `[L, …]` with one row per token, and a
    `recurrent` tensor has any shape. `StateKind` in bundle.proto defines the kinds.
    """

    name: str
    kind: Literal["stack", "history", "recurrent"]
    shape: tuple[int, ...]
    initial: float = 0.0
    kept: int = 1
    """Of a stack: entries that are left of a folded block. The span: it is never folded."""


@dataclass(frozen=True)
class Schedule:
    """A fold is due whenever the number of tokens is a multiple of `span`; no step crosses a fold.

    It takes the newest `span` entries of every stack and `span` rows of every history. If `binary`,
    it takes 1 + z entries and 2^z rows, where 2^z is the largest power of two that divides the
    number of tokens, like the carries of a binary counter.

    The first `keep_first` blocks are not folded, and a block only when `keep_newest` complete ones
    have followed it: then a fold takes the entries of these, too, and no rows.
    """

    span: int
    binary: bool = False
    keep_first: int = 0
    keep_newest: int = 0

    @property
    def taken(self) -> int:
        """Entries that a fold takes, if not `binary`."""
        return (1 + self.keep_newest) * self.span

    def entries(self, pushed: int, kept: int = 1) -> int:
        """Entries of a stack that keeps `kept` of a block, after `pushed` tokens."""
        if self.binary:
            return pushed.bit_count()
        folded = max(0, pushed // self.span - self.keep_first - self.keep_newest)
        return pushed - folded * (self.span - kept)

    def folds(self, pushed: int) -> bool:
        """Whether a fold is due after so many tokens."""
        behind = pushed // self.span - self.keep_first - self.keep_newest
        return pushed % self.span == 0 and behind > 0

    def most_entries(self, context: int, kept: int = 1) -> int:
        """The most entries on the way to `context` tokens, if not `binary`."""
        ends = {context, context - context % self.span or context}
        return max(self.entries(end - 1, kept) + 1 for end in ends)


class Push(Protocol):
    """The decode kernel: pushes T tokens onto the stacks of keys and values, then attends."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *, window: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output `[B, H, T, D]` and the new stacks, from q, k, v `[B, H, T, D]` and stacks
        `[B, H, E, D]`. k, v and the stacks may have fewer heads. `window` is the number of the
        newest entries that a token attends to; 0 means all.
        """


@dataclass(frozen=True)
class Place:
    """Where T new tokens of B streams go."""

    positions: Tensor
    """Absolute positions, `[B, T]`, int64."""
    lengths: Tensor
    """Valid entries of every stack after the push, `[B]`."""
    push: Push
    """The decode kernel for these `lengths`."""


class Pattern(nn.Module, ABC):
    """Attention of one layer. The caller has already divided the queries by sqrt(D)."""

    schedule: Schedule | None = None
    """When the state folds; None if it never folds."""

    @abstractmethod
    def support(self, position: int) -> Support:
        """The index sets of the token at `position`; positions count from 0."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Attention of all tokens at once, `[B, H, T, D]`, for any T; `x` is `[B, T, width]`."""

    @abstractmethod
    def state(self) -> tuple[StateTensor, ...]:
        """The decode state of one stream. Raises ValueError for a pattern that cannot decode."""

    @abstractmethod
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """Decode T more tokens of each stream: the attention output, and the changed state."""

    def fold(self, state: State) -> State:
        """The state tensors that a fold changes.

        `state` has the newest part of each stack `[B, H, entries, D]` and history
        `[B, tokens, …]`, as long as the schedule says, and the whole of each recurrent tensor. For
        a stack, the result is the one entry `[B, H, 1, D]` that replaces the part; for a history,
        it is the new content of the part.
        """
        raise NotImplementedError

    def fold_at(self, state: State, tokens: Tensor) -> State:
        """The same, if it is known how many `tokens[B]` each stream has.

        With blocks that the schedule keeps, what replaces the part of a stack has the entries of
        these, too. A stack of whose part nothing is left may be missing.
        """
        return self.fold(state)

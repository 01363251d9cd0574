"""What a pattern is: index sets, the parallel forward they define, and the state that decodes it.

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
    """What one token attends to: single tokens, and whole spans (arXiv 2107.05768, eq. 4)."""

    direct: tuple[int, ...]
    """Omega^0; the token itself is in it."""
    spans: tuple[tuple[int, ...], ...] = ()
    """Omega^1 … Omega^n, oldest first. Not empty."""

    @classmethod
    def of(cls, direct: Iterable[int], spans: Iterable[Sequence[int]] = ()) -> Support:
        """From anything that can be iterated; empty spans are left out."""
        return cls(tuple(direct), tuple(tuple(span) for span in spans if len(span)))


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's decode state, for one stream.

    A `stack` is `[H, entries, D]`, a `history` `[L, …]` with one row per token, a `recurrent`
    tensor has any shape. What a kind means is said in the manifest's contract.
    """

    name: str
    kind: Literal["stack", "history", "recurrent"]
    shape: tuple[int, ...]
    initial: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A fold is due whenever the number of tokens is a multiple of `span`; no step crosses one.

    It takes the newest `span` entries of every stack and of every history; or, when `binary`,
    1 + z entries of a stack and 2^z of a history, where 2^z is the largest power of two that
    divides the number of tokens: the carries of a binary counter.
    """

    span: int
    binary: bool = False


class Push(Protocol):
    """Pushes T tokens onto the stacks of keys and values and attends: the decode kernel."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, H, T, D]` and stacks `[B, H, E, D]` to what was read, and the stacks after."""


@dataclass(frozen=True)
class Place:
    """Where the T new tokens of B streams belong."""

    positions: Tensor
    """Absolute positions, `[B, T]`, int64."""
    lengths: Tensor
    """Valid entries of every stack once they are pushed, `[B]`."""
    push: Push
    """The kernel, bound to `lengths`."""


class Pattern(nn.Module, ABC):
    """Attention of one layer. Queries are divided by sqrt(D) before they come here."""

    schedule: Schedule | None = None
    """When the state folds; None for patterns that never do."""

    @abstractmethod
    def support(self, position: int) -> Support:
        """The index sets of the token at `position`, counted from 0."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Attention of all tokens at once, `[B, H, T, D]`, for any T; `x` is `[B, T, width]`."""

    @abstractmethod
    def state(self) -> tuple[StateTensor, ...]:
        """What a stream keeps. Raises ValueError for a pattern that cannot decode."""

    @abstractmethod
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """T more tokens of each stream: what they read, and those state tensors that changed."""

    def fold(self, state: State) -> State:
        """Those state tensors that a due fold changes.

        Stacks `[B, H, entries, D]` and histories `[B, tokens, …]` come as the newest part that the
        schedule names, recurrent tensors whole. A stack comes back as the one entry `[B, H, 1, D]`
        that replaces that part, a history as the part itself, changed.
        """
        raise NotImplementedError

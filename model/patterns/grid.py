"""What the axial patterns share: tokens as a grid, and attention along its rows and columns.

Shapes: `n` rows of `m` tokens, `B` batch, `H` heads, `T` tokens, `E` entries, `D` head_dim. In the
parallel forward, queries are `[B, H, n, m, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import attend, cumulative_max, future, read, softmax, write
from model.config import ModelConfig
from model.patterns.pattern import Place, State, StateTensor


@dataclass(frozen=True)
class Part:
    """Entries that all tokens of the grid attend to; several parts share one softmax."""

    logits: Tensor
    """`[B, H, n, m, E]`."""
    mix: Callable[[Tensor], Tensor]
    """Maps weights `[B, H, n, m, E]` to the weighted sum of the values, `[B, H, n, m, D]`."""


@dataclass(frozen=True)
class Entries:
    """The entries that each of T tokens attends to in a decode step."""

    keys: Tensor
    """`[B, T, E, H, D]`."""
    values: Tensor
    """`[B, T, E, H, D]`."""
    valid: Tensor
    """`[B, T, E]`."""


class Grid:
    """Rows of `span` tokens over the whole context, and the tokens in a token's row and column."""

    def __init__(self, config: ModelConfig) -> None:
        self.width, self.rows = config.span, config.blocks
        self.heads, self.dim = config.heads, config.head_dim
        self.history = (config.context, config.heads, config.head_dim)

    def direct(self, position: int) -> list[int]:
        """The tokens above in the column, oldest first, then those of the row up to `position`."""
        begin, column = position // self.width * self.width, position % self.width
        return [*range(column, begin, self.width), *range(begin, position + 1)]

    def parts(self, q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
        """The tokens of the own row and column, in the parallel forward."""
        rows = torch.arange(q.shape[2], device=q.device)
        return [
            along_rows(q, k, v, future(self.width, q.device)),
            along_columns(q, k, v, rows >= rows[:, None, None]),
        ]

    def state(self) -> tuple[StateTensor, ...]:
        """Raw keys and values of every token."""
        return tuple(StateTensor(name, "history", self.history) for name in ("keys", "values"))

    def push(self, k: Tensor, v: Tensor, place: Place, state: State) -> dict[str, Tensor]:
        """The histories of raw keys and values with T more tokens."""
        return {
            "keys": write(state["keys"], k.transpose(1, 2), place.positions),
            "values": write(state["values"], v.transpose(1, 2), place.positions),
        }

    def own_row(self, positions: Tensor, keys: Tensor, values: Tensor) -> Entries:
        """Tokens of the own row, up to the token itself."""
        begin = positions - positions % self.width
        tokens = begin[..., None] + torch.arange(self.width, device=positions.device)
        return _look_up(keys, values, tokens, tokens <= positions[..., None], positions)

    def above(self, positions: Tensor, keys: Tensor, values: Tensor) -> Entries:
        """What two histories hold for the same column in all earlier rows."""
        column = positions % self.width
        steps = self.width * torch.arange(self.rows - 1, device=positions.device)
        tokens = column[..., None] + steps
        return _look_up(keys, values, tokens, tokens < positions[..., None], positions)


def along_rows(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Part:
    """Entries `[B, H, n, E, D]` for each row; the mask `hidden` broadcasts to `[n, m, E]`."""
    logits = (q @ keys.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    return Part(logits, lambda weights: weights @ values)


def along_columns(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Part:
    """Entries `[B, H, E, m, D]` for each column; the mask `hidden` broadcasts to `[n, m, E]`."""
    keys, values = keys.transpose(2, 3), values.transpose(2, 3)
    logits = (q.transpose(2, 3) @ keys.transpose(-1, -2)).transpose(2, 3)
    return Part(
        logits.masked_fill(hidden, float("-inf")),
        lambda weights: (weights.transpose(2, 3) @ values).transpose(2, 3),
    )


def attend_parts(parts: Sequence[Part], length: int) -> Tensor:
    """One softmax over all parts (arXiv 2107.05768, eq. 9): `[B, H, length, D]`."""
    weights = softmax(torch.cat([part.logits for part in parts], dim=-1))
    shares = weights.split([part.logits.shape[-1] for part in parts], dim=-1)
    dtype = parts[0].logits.dtype
    mixed = [part.mix(share.to(dtype)) for part, share in zip(parts, shares, strict=True)]
    return torch.stack(mixed).sum(dim=0).flatten(2, 3)[:, :, :length]


def attend_entries(q: Tensor, entries: Sequence[Entries]) -> Tensor:
    """One softmax over all entries: `[B, H, T, D]`."""
    keys, values = (
        torch.cat([getattr(e, name) for e in entries], dim=2) for name in ("keys", "values")
    )
    return attend(q, keys, values, torch.cat([e.valid for e in entries], dim=2))


def summaries_of_earlier(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """For every token of a line, a summary of the tokens before it: keys and values `[…, E, D]`.

    For the first token the result is finite but has no meaning; the caller must mask it.
    """
    query, key = (torch.cat((y[..., :1, :], cumulative_max(y)[..., :-1, :]), -2) for y in (q, k))
    hidden = future(q.shape[-2] + 1, q.device)[:-1, 1:]  # the token itself and later tokens
    hidden = hidden & (torch.arange(q.shape[-2], device=q.device) > 0)[:, None]
    logits = (query @ k.transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    return key, softmax(logits).to(v.dtype) @ v


def _look_up(
    keys: Tensor, values: Tensor, tokens: Tensor, valid: Tensor, positions: Tensor
) -> Entries:
    inside = torch.where(valid, tokens, positions[..., None])
    return Entries(read(keys, inside), read(values, inside), valid)

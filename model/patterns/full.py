"""Full attention: the baseline for every other pattern."""

from __future__ import annotations

from torch import Tensor

from model.attention import causal_attention
from model.config import ModelConfig
from model.patterns.pattern import Pattern, Place, State, StateTensor, Support


class Full(Pattern):
    """Each token attends to itself and all earlier tokens, or to the newest of them.

    The stack never folds. With a window it is no shorter, but what lies behind is not read.
    """

    def __init__(self, config: ModelConfig, window: int = 0) -> None:
        super().__init__()
        self.window = window
        self.stack = (config.kv_heads, config.context, config.head_dim)
        # Beside layers that fold, no fold takes anything of this one.
        self.kept = 1 if config.architecture.folding is None else config.span

    def support(self, position: int) -> Support:
        """See Pattern."""
        return Support.of(range(self._first(position), position + 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        return causal_attention(q, k, v, self.window)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        names = ("keys", "values")
        return tuple(StateTensor(name, "stack", self.stack, kept=self.kept) for name in names)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        stacks = state["keys"], state["values"]
        out, keys, values = place.push(q, k, v, *stacks, window=self.window)
        return out, {"keys": keys, "values": values}

    def _first(self, position: int) -> int:
        return max(0, position + 1 - self.window) if self.window else 0

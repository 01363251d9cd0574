"""Full attention: the baseline for every other pattern."""

from __future__ import annotations

from torch import Tensor

from model.attention import causal_attention
from model.config import ModelConfig
from model.patterns.pattern import Pattern, Place, State, StateTensor, Support


class Full(Pattern):
    """Each token attends to itself and all earlier tokens. The stack never folds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stack = (config.heads, config.context, config.head_dim)

    def support(self, position: int) -> Support:
        """See Pattern."""
        return Support.of(range(position + 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        return causal_attention(q, k, v)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return StateTensor("keys", "stack", self.stack), StateTensor("values", "stack", self.stack)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        out, keys, values = place.push(q, k, v, state["keys"], state["values"])
        return out, {"keys": keys, "values": values}

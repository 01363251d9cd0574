"""Patterns side by side: trained on the same budget, weighed by what a stream of each costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from model.config import Attention, ModelConfig, Pooling
from model.patterns import make_pattern


@dataclass(frozen=True)
class Variant:
    """An attention pattern and its pooling, written `fixed` or `fixed:mean`."""

    attention: Attention
    pooling: Pooling = "max"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """From its written form. Raises ValueError for a name that is none, when it is used."""
        attention, _, pooling = text.partition(":")
        return cls(attention, pooling or "max")  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.attention if self.pooling == "max" else f"{self.attention}:{self.pooling}"


def configure(base: ModelConfig, variant: Variant) -> ModelConfig:
    """`base` with another pattern and the same number of weights.

    Where a pattern brings weights of its own, the MLP is narrower by as many.
    """
    config = dataclasses.replace(base, attention=variant.attention, pooling=variant.pooling)
    own = sum(p.numel() for p in make_pattern(config).parameters())
    return dataclasses.replace(config, mlp=config.mlp - round(own / (2 * config.width)))

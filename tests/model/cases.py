"""Every pattern with every pooling, random tokens for them, and what they read by definition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ROWS, Attention, ModelConfig, Pooling
from model.patterns import PATTERNS, make_pattern
from model.patterns.mixture import Mixture
from model.patterns.pattern import Pattern, Support
from tests import reference

HEADS, DIM, SPAN = 2, 8, 5


@dataclass(frozen=True)
class Case:
    """A pattern and its pooling."""

    attention: Attention
    pooling: Pooling = "max"

    def config(
        self, length: int, span: int = SPAN, heads: int = HEADS, dim: int = DIM
    ) -> ModelConfig:
        """The smallest shape of this case that takes `length` tokens."""
        context = max(2, length)
        if "logsparse" not in self.attention and self.attention != "full":
            context = max(span, length)
        if self.attention in ROWS:
            context = max(2 * span, -(-length // span) * span)
        return ModelConfig(
            vocabulary=7,
            context=context,
            width=heads * dim,
            heads=heads,
            span=span,
            attention=self.attention,
            pooling=self.pooling,
        )

    def make(self, length: int, span: int = SPAN, heads: int = HEADS, dim: int = DIM) -> Pattern:
        """The pattern, in float64, whose own weights, if it has any, are random."""
        pattern = make_pattern(self.config(length, span, heads, dim)).double().requires_grad_(False)
        generator = torch.Generator().manual_seed(3)
        for weight in pattern.parameters():
            noise = torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
            weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1 + noise / 3)
        return pattern

    def __str__(self) -> str:
        return self.attention if self.pooling == "max" else f"{self.attention}:{self.pooling}"


CASES = [
    *(Case(attention) for attention in PATTERNS),
    *(
        Case(attention, pooling)
        for attention in ("fixed", "fixed-bidirectional")
        for pooling in ("mean", "deepset-max")
    ),
]
CAUSAL = [case for case in CASES if case.attention != "fixed-bidirectional"]
SPARSE = [case for case in CASES if case.attention.startswith("sparse")]


class Tokens(NamedTuple):
    """What a layer makes of B streams of T tokens."""

    q: Tensor
    """`[B, heads, T, D]`, as k and v."""
    k: Tensor
    v: Tensor
    x: Tensor
    """`[B, T, width]`."""

    def part(self, first: int, last: int, row: int = 0) -> Tokens:
        """Tokens `first … last - 1` of one stream."""
        q, k, v = (y[row : row + 1, :, first:last] for y in self[:3])
        return Tokens(q, k, v, self.x[row : row + 1, first:last])

    def then(self, other: Tokens) -> Tokens:
        """These, and the others behind them."""
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(self[:3], other[:3], strict=True))
        return Tokens(q, k, v, torch.cat((self.x, other.x), dim=1))


def draw(
    length: int,
    seed: int = 0,
    scale: float = 1.0,
    rows: int = 1,
    heads: int = HEADS,
    dim: int = DIM,
) -> Tokens:
    """Random tokens; `scale` sharpens the softmax."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, rows, heads, length, dim)
    q, k, v = torch.randn(shape, dtype=torch.float64, generator=generator)
    x = torch.randn(rows, length, heads * dim, dtype=torch.float64, generator=generator)
    return Tokens(q * scale, k, v, x)


def by_definition(case: Case, pattern: Pattern, tokens: Tokens) -> Tensor:
    """What the tokens of one stream read, `[1, heads, T, D]`; of `pattern`, its weights count."""
    if case.attention == "mixture-averaged":
        assert isinstance(pattern, Mixture)
        columns = by_definition(Case("axial-vertical"), pattern.vertical, tokens)
        return (columns + by_definition(Case("axial-horizontal"), pattern.horizontal, tokens)) / 2
    q, k, v = (y[0].numpy() for y in tokens[:3])
    length = q.shape[1]
    supports = [pattern.support(position) for position in range(length)]
    if case not in CAUSAL:
        supports = [before(length, support) for support in supports]
    summary = _summary(case, dict(pattern.named_parameters()), tokens.x[0])
    return torch.from_numpy(reference.attend(q, k, v, supports, summary))[None]


def before(length: int, support: Support) -> Support:
    """What is left of a support in a sequence of `length` tokens."""
    parts = (support.direct, *support.spans)
    direct, *spans = ([token for token in part if token < length] for part in parts)
    return Support.of(direct, spans)


def _summary(case: Case, weights: Mapping[str, Tensor], x: Tensor) -> reference.Summary:
    w = {name: weight.numpy() for name, weight in weights.items()}
    if case.attention == "axial-rowmajor":
        norm = w["norm.weight"], w["norm.bias"]
        return reference.row_major(x.numpy(), w["out.weight"], *norm, w["key.weight"])
    if case.attention == "logsparse-hierarchical":
        return reference.hierarchical
    if case.pooling == "mean":
        return reference.pooled(reference.by_mean, reference.by_mean)
    if case.pooling == "deepset-max":
        layers = w["of_queries.weight"], w["of_keys.weight"]
        return reference.pooled(*(reference.by_deep_set(layer) for layer in layers))
    return reference.pooled(reference.by_maximum, reference.by_maximum)

"""Chooses how each layer attends, so that the state fits into a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.layers.architecture import Folding, LayerAttention
from model.patterns import make_pattern


class BudgetError(ValueError):
    """A budget that no choice of layers fits into. The message says what to change."""


@dataclass(frozen=True)
class LayerErrors:
    """By how much a layer's attention output changes, relative to its size, squared."""

    window: float
    """If old blocks are dropped."""
    tangent: float
    """If they are folded, before anything is fitted."""
    fitted: float


def choose(
    config: ModelConfig, errors: Sequence[LayerErrors], budget: float
) -> tuple[LayerAttention, ...]:
    """The attention of each layer, the layers that change most being full.

    config: folds every layer, with the span, sink and window to use. budget: share of the numbers
    that full attention keeps in the whole context. Raises BudgetError if it is too small.
    """
    folding = config.architecture.folding
    assert folding is not None
    cheapest: list[LayerAttention] = [
        "window" if folding.window and each.window <= each.fitted else "fold" for each in errors
    ]
    sizes = {kind: _numbers(config, kind) for kind in {*cheapest, "full"}}
    for layer, width in enumerate(config.architecture.windows):
        if width:  # a layer that slides already stays as it was trained
            cheapest[layer] = "full"
    chosen, most = list(cheapest), budget * sizes["full"] * config.layers
    least = sum(sizes[kind] for kind in chosen)
    if least > most:
        share = least / (sizes["full"] * config.layers)
        raise BudgetError(
            f"the budget is {budget:g} of full attention's state, and all layers folded take "
            f"{share:.3f} of it at {config.context:,} tokens: raise --budget, or lower --window"
        )
    order = sorted(range(config.layers), key=lambda n: -min(errors[n].window, errors[n].fitted))
    for layer in order:
        more = sizes["full"] - sizes[chosen[layer]]
        if chosen[layer] != "full" and least + more <= most:
            chosen[layer], least = "full", least + more
    return tuple(chosen)


def share(config: ModelConfig) -> float:
    """How much of the numbers of full attention a folded model keeps in its whole context."""
    folding = config.architecture.folding
    assert folding is not None
    kept = sum(_numbers(config, kind) for kind in folding.layers)
    return kept / (_numbers(config, "full") * config.layers)


def rival(config: ModelConfig) -> ModelConfig:
    """The same with sliding windows in place of folds, each as wide as it takes to keep as much."""
    folding = config.architecture.folding
    assert folding is not None
    layers: tuple[LayerAttention, ...] = tuple(
        "full" if kind == "full" else "window" for kind in folding.layers
    )
    wanted = sum(_numbers(config, kind) for kind in folding.layers)
    window = max(1, folding.window)
    while True:
        built = replace(config.architecture, folding=Folding(layers, folding.sink, window, "max"))
        slides = replace(config, architecture=built)
        if sum(_numbers(slides, kind) for kind in layers) >= wanted:
            return slides
        if (folding.sink + window + 1) * config.span >= config.context:
            return slides
        window += 1


def with_layers(config: ModelConfig, layers: Sequence[LayerAttention]) -> ModelConfig:
    """The same with this attention of each layer."""
    folding = config.architecture.folding
    assert folding is not None
    folding = replace(folding, layers=tuple(layers))
    return replace(config, architecture=replace(config.architecture, folding=folding))


def _numbers(config: ModelConfig, kind: LayerAttention) -> int:
    """Numbers in the state of a layer of a kind."""
    if kind == "full":
        return 2 * config.kv_heads * config.context * config.head_dim
    one = replace(config, architecture=replace(config.architecture, windows=()))
    pattern = make_pattern(with_layers(one, [kind] * config.layers))
    return sum(math.prod(tensor.shape) for tensor in pattern.state())

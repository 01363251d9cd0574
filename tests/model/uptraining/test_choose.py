"""The layers that would lose most stay full, and the state is never above the budget."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from model.config import ModelConfig
from model.decoder import Block, Decoder
from model.layers.architecture import Folding
from model.uptraining.choose import BudgetError, LayerErrors, choose, rival, share, with_layers
from tests.checkpoints import folded_config

CONTEXT = 512
ALL = folded_config(Folding(("fold",) * 6, 1, 1, "fitted"), CONTEXT, 8)
# Layer 2 loses nothing by a window, layer 4 most by either.
ERRORS = [
    LayerErrors(window, 2 * fitted, fitted)
    for window, fitted in (
        (0.5, 0.1),
        (0.9, 0.3),
        (0.05, 0.06),
        (0.8, 0.2),
        (2.0, 0.7),
        (0.3, 0.25),
    )
]


def numbers(config: ModelConfig) -> int:
    """Numbers in the state of one stream at the end of the context."""
    blocks = [block for block in Decoder(config).blocks if isinstance(block, Block)]
    return sum(math.prod(t.shape) for block in blocks for t in block.pattern.state())


FULL = numbers(replace(ALL, architecture=replace(ALL.architecture, folding=None)))


def test_the_worst_layers_are_full() -> None:
    for budget, expected in (
        (0.2, ("fold", "fold", "window", "fold", "fold", "fold")),
        (0.35, ("fold", "fold", "window", "fold", "full", "fold")),
        (0.5, ("fold", "full", "window", "fold", "full", "fold")),
        (0.6, ("fold", "full", "window", "fold", "full", "full")),
        (0.75, ("fold", "full", "window", "full", "full", "full")),
    ):
        assert choose(ALL, ERRORS, budget) == expected, budget


@pytest.mark.parametrize("budget", [0.19, 0.25, 0.4, 0.5, 0.7])
def test_the_budget_is_used_and_never_exceeded(budget: float) -> None:
    chosen = choose(ALL, ERRORS, budget)
    config = with_layers(ALL, chosen)
    kept = numbers(config) / FULL
    assert share(config) == pytest.approx(kept)
    assert kept <= budget
    worst = next(n for n in (4, 1, 5, 3, 0, 2) if chosen[n] != "full")
    more = with_layers(ALL, [*chosen[:worst], "full", *chosen[worst + 1 :]])
    assert numbers(more) / FULL > budget


def test_a_budget_below_the_least_is_refused() -> None:
    least = share(with_layers(ALL, ("fold", "fold", "window", "fold", "fold", "fold")))
    with pytest.raises(BudgetError, match=rf"all layers folded take {least:.3f} of it at 512"):
        choose(ALL, ERRORS, 0.99 * least)
    choose(ALL, ERRORS, 1.01 * least)


def test_a_layer_that_slides_already_stays_as_it_is() -> None:
    built = replace(
        ALL.architecture,
        windows=(16, 0, 0, 0, 0, 0),
        folding=replace(ALL.architecture.folding, layers=("full", *("fold",) * 5)),  # type: ignore[type-var]
    )
    chosen = choose(replace(ALL, architecture=built), ERRORS, 0.5)
    assert chosen == ("full", "fold", "window", "fold", "full", "fold")


def test_the_rival_has_the_same_full_layers_and_no_less_to_remember() -> None:
    for budget in (0.2, 0.35, 0.6):
        config = with_layers(ALL, choose(ALL, ERRORS, budget))
        slides = rival(config)
        folding, own = slides.architecture.folding, config.architecture.folding
        assert folding is not None and own is not None
        assert [kind == "full" for kind in folding.layers] == [k == "full" for k in own.layers]
        assert "fold" not in folding.layers and folding.sink == own.sink
        assert numbers(slides) >= numbers(config)
        less = replace(folding, window=folding.window - 1)
        narrower = replace(slides, architecture=replace(slides.architecture, folding=less))
        assert numbers(narrower) < numbers(config)


def test_without_a_window_every_other_layer_folds() -> None:
    built = ALL.architecture
    bare = replace(ALL, architecture=replace(built, folding=Folding(("fold",) * 6, 1, 0, "fitted")))
    assert choose(bare, ERRORS, 0.35) == ("fold", "fold", "fold", "fold", "full", "fold")

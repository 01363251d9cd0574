"""A shape that cannot be trained or served is refused when it is written down."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import ModelConfig


def config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {"vocabulary": 7, "context": 26, "width": 32, "heads": 2, "span": 8}
    return ModelConfig(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"mlp": -1}, "mlp must be at least 1, got -1"),
        ({"starts": 0}, "starts must be at least 1, got 0"),
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"span": 1}, "span must be at least 2, got 1"),
        ({"width": 36}, "width 36 over 2 heads: .* a width that is one of 16"),
        ({"width": 33, "heads": 1}, "width 33 over 1 heads"),
        ({"attention": "axial"}, "attention must be 'fixed' or 'full', got 'axial'"),
        ({"positions": "rotary"}, "positions must be 'factored' or 'sinusoid', got 'rotary'"),
    ],
)
def test_names_the_value_and_the_limit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("attention", "context", "span", "blocks", "entries"),
    [
        ("fixed", 32, 8, 4, 11),
        ("fixed", 26, 8, 4, 11),
        ("fixed", 8, 8, 1, 8),
        ("fixed", 5, 8, 1, 5),
        ("full", 26, 8, 4, 26),
    ],
)
def test_arithmetic_of_the_stack(
    attention: Any, context: int, span: int, blocks: int, entries: int
) -> None:
    made = config(attention=attention, context=context, span=span)
    assert (made.head_dim, made.blocks, made.entries) == (16, blocks, entries)


@pytest.mark.parametrize("span", [2, 5, 8])
def test_entries_are_enough_at_every_token_and_needed_by_whole_blocks(span: int) -> None:
    for context in range(2, 6 * span):
        made = config(context=context, span=span)
        held = [t // span + t % span + 1 for t in range(context)]  # after a push, before the fold
        assert max(held) <= made.entries
        if context % span == 0:
            assert max(held) == made.entries

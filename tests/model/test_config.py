"""A shape that cannot be trained or served is refused when it is written down."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from model.config import ROWS, Attention, ModelConfig
from model.layers.architecture import OURS, Architecture, Rope
from model.patterns import PATTERNS


def config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {"vocabulary": 7, "context": 26, "width": 32, "heads": 2, "span": 8}
    return ModelConfig(**{**settings, **changes})


NOT_ROWS = "is not two or more whole rows of 8 tokens: {} needs a context that is a multiple of the"


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
        ({"width": 36}, "width is 36 with 2 heads: it must be a multiple of 16"),
        ({"width": 33, "heads": 1}, "width is 33 with 1 heads"),
        ({"attention": "axial"}, "attention must be one of full, fixed, .*; got 'axial'"),
        ({"positions": "rotary"}, "positions must be one of factored, .*; got 'rotary'"),
        ({"pooling": "min"}, "pooling must be one of max, mean, deepset-max; got 'min'"),
        ({"context": 7}, "context 7 is shorter than one block of 8 tokens: fixed needs a span"),
        *(
            ({"attention": name, "context": 7}, f"shorter than one block .*: {name} needs a span")
            for name in ("fixed-bidirectional", "sparse-fixed", "sparse-strided")
        ),
        *(
            ({"attention": name, "context": context}, f"context {context} {NOT_ROWS}")
            for name in ROWS
            for context in (8, 26)
        ),
        *(
            (
                {"attention": name, "context": 32, "pooling": "mean"},
                "pooling is mean, but {} has no",
            )
            for name in PATTERNS
            if name not in ("fixed", "fixed-bidirectional")
        ),
    ],
)
def test_names_the_value_and_the_limit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.format(changes.get("attention"))):
        config(**changes)


def test_every_name_has_a_pattern() -> None:
    assert tuple(PATTERNS) == get_args(Attention)


@pytest.mark.parametrize("attention", PATTERNS)
def test_the_smallest_context_of_every_pattern(attention: Attention) -> None:
    if attention in ROWS:
        smallest = 16
    else:
        smallest = 2 if "logsparse" in attention or attention == "full" else 8
    assert config(attention=attention, context=smallest).context == smallest


def test_only_a_pattern_that_reads_ahead_is_masked() -> None:
    masked = [name for name in PATTERNS if config(attention=name, context=32).masked]
    assert masked == ["fixed-bidirectional"]


@pytest.mark.parametrize(("context", "blocks"), [(32, 4), (26, 4), (24, 3), (8, 1)])
def test_arithmetic(context: int, blocks: int) -> None:
    made = config(context=context)
    assert (made.head_dim, made.blocks) == (16, blocks)


FULL = {"attention": "full"}


@pytest.mark.parametrize(
    ("built", "changes", "message"),
    [
        ({"head_dim": 12}, {}, "head_dim is 12: it must be a multiple of 8 for the decode kernel"),
        ({"kv_heads": 3}, FULL, "kv_heads is 3: 2 heads cannot share them evenly"),
        ({"tied": True}, {}, "tied embeddings leave no room for start tokens: starts must be 0"),
        ({"rope": Rope((1.0,) * 9)}, FULL, "rope turns 18 channels of a head, which has 16"),
        ({"rope": Rope(())}, FULL, "rope turns 0 channels of a head"),
        ({"windows": (4,)}, FULL, "windows has 1 layers of 4"),
        ({"windows": (4,) * 4}, {}, "windows needs full attention, and attention is fixed"),
        ({"kv_heads": 1}, {}, "kv_heads needs full attention, and attention is fixed"),
        ({"rope": Rope((1.0,))}, {}, "rope needs full attention, and attention is fixed"),
        ({"tied": True}, {"starts": -1}, "starts must be at least 0, got -1"),
    ],
)
def test_an_architecture_has_to_fit(
    built: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(architecture=Architecture(**built), **changes)


def test_what_is_stored_is_read_back() -> None:
    built = Architecture(kv_heads=1, rope=Rope((1.0, 0.1), 1.5), windows=(4, 0), biases=("qkv",))
    made = config(attention="full", layers=2, architecture=built)
    assert ModelConfig.read(json.loads(json.dumps(made.stored()))) == made


def test_what_is_stored_of_our_models_has_no_architecture() -> None:
    made = config()
    assert made.architecture == OURS
    assert "architecture" not in made.stored()
    assert ModelConfig.read(made.stored()) == made

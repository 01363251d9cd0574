"""Operations in the manifest are those that the formulas of the patterns ask for."""

from __future__ import annotations

from typing import Any

import pytest

from concertina.bundle.resources import step_flops
from concertina.v1 import bundle_pb2 as pb
from export.bundle import describe
from model.config import Attention, ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder
from model.run import Checkpoint, TrainConfig

WIDTH, LAYERS, MLP, VOCABULARY, SPAN, ROWS = 32, 3, 40, 7, 8, 6
WEIGHTS = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP) + WIDTH * VOCABULARY
ENTRY = (
    2 * WIDTH
)  # multiply-adds of one entry in one layer: a product with its key, one with its value


def manifest(attention: Attention, **changes: Any) -> pb.Manifest:
    config = ModelConfig(
        VOCABULARY,
        context=SPAN * ROWS,
        width=WIDTH,
        layers=LAYERS,
        heads=4,
        mlp=MLP,
        span=SPAN,
        attention=attention,
        **changes,
    )
    info = DatasetInfo("text", VOCABULARY, "noise", "CC0-1.0")
    checkpoint = Checkpoint(config, TrainConfig(), info, 1, {"tokens": 1.0}, Decoder(config))
    return describe(checkpoint, "counted", "1")


def attended(attention: Attention, position: int) -> float:
    """Entries of one layer that a token's step multiplies with; what is listed counts whole."""
    row, column = divmod(position, SPAN)
    axes = SPAN + ROWS - 1
    return {
        "full": position + 1,
        "fixed": row + column + 1,
        "sparse-fixed": row + column + 1,
        "logsparse": position.bit_count() + 1,
        "logsparse-hierarchical": position.bit_count() + 1,
        "sparse-logsparse": 1 + 6,
        "sparse-strided": SPAN + ROWS - 1,
        "sparse-axial": axes,
        "axial-rowmajor": axes,
        "axial-vertical": axes + SPAN + ROWS,  # and the column above again, for its live summary
        "axial-horizontal": axes + 2 * (ROWS - 1),
        "mixture": axes + SPAN + ROWS + 2 * (ROWS - 1),
        "mixture-averaged": 2 * axes + SPAN + ROWS + 2 * (ROWS - 1),
    }[attention]


def folded(attention: Attention, pushed: int) -> float:
    """Multiply-adds of one layer's fold after `pushed` tokens, in entries."""
    span = SPAN if pushed % SPAN == 0 else 0
    tokens = pushed & -pushed if pushed % 2 == 0 else 0
    return {
        "fixed": span,
        "logsparse": tokens,
        # Only the values: the products of queries and keys are elementwise.
        "logsparse-hierarchical": tokens.bit_length() / 2 if tokens else 0,
        "axial-rowmajor": span * (SPAN + WIDTH),  # and two projections of width x width per token
        "axial-horizontal": 2 * span * SPAN,
        "mixture": 2 * span * SPAN,
        "mixture-averaged": 2 * span * SPAN,
    }.get(attention, 0)


@pytest.mark.parametrize(
    "attention",
    [
        "full",
        "fixed",
        "sparse-fixed",
        "logsparse",
        "logsparse-hierarchical",
        "sparse-logsparse",
        "sparse-strided",
        "sparse-axial",
        "axial-rowmajor",
        "axial-vertical",
        "axial-horizontal",
        "mixture",
        "mixture-averaged",
    ],
)
def test_counted_operations_are_those_of_the_formulas(attention: Attention) -> None:
    made = manifest(attention)
    for position in range(SPAN * ROWS):
        entries = attended(attention, position) + folded(attention, position + 1)
        assert step_flops(made, position) == 2 * (WEIGHTS + LAYERS * ENTRY * entries), position


def test_a_learned_pooling_costs_two_more_products() -> None:
    plain, learned = manifest("fixed"), manifest("fixed", pooling="deepset-max")
    dim = WIDTH // 4
    more = 2 * LAYERS * WIDTH * dim
    assert step_flops(learned, 5) - step_flops(plain, 5) == more
    assert step_flops(learned, SPAN - 1) - step_flops(plain, SPAN - 1) == more * (1 + SPAN)
    assert (plain.attention, learned.attention) == ("fixed", "fixed:deepset-max")

"""What a stream keeps is what the pattern keeps by the book, and a step of it runs."""

from __future__ import annotations

import math

import pytest

from model.decoder import Block
from model.layers.architecture import Folding
from model.uptraining import sizes
from model.uptraining.sizes import size
from tests.checkpoints import folded_config, random_decoder
from tests.model.streams import entries_after

MODEL = random_decoder(folded_config(Folding(("full", "fold", "window"), 1, 2, "fitted"), 200, 8))


@pytest.mark.parametrize("length", [1, 24, 32, 33, 100, 199, 200])
def test_entries_are_those_of_the_patterns(length: int) -> None:
    found = size(MODEL, length)
    patterns = [block.pattern for block in MODEL.blocks if isinstance(block, Block)]
    assert found.length == length
    assert found.entries == tuple(entries_after(pattern, length) for pattern in patterns)
    in_stacks = sum(entries * 2 * 2 * 8 for entries in found.entries)  # 2 heads of 8
    assert found.bytes == 4 * (in_stacks + 4 * 8)  # and the pooled query of the layer that folds
    assert 0 < found.step_seconds < 60


def test_what_would_fill_the_memory_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = size(MODEL, 200)
    monkeypatch.setattr(sizes, "MOST_BYTES", whole.bytes - 1)
    found = size(MODEL, 200)
    assert math.isnan(found.step_seconds) and found.bytes == whole.bytes

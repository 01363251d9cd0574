"""Losses by position, as the parallel model has them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.layers.architecture import Folding
from model.uptraining.measure import last_quarter, losses
from tests.checkpoints import folded_config, random_decoder

MODEL = random_decoder(folded_config(Folding(("full", "fold", "window"), 1, 1, "fitted"), 600))


def test_losses_are_those_of_each_quarter() -> None:
    tokens = torch.randint(7, (3, 530), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = MODEL(tokens[:, :-1])
    each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    found = losses(MODEL, tokens)
    ends = (0, 132, 264, 397, 529)
    expected = [float(each[:, a:b].mean()) for a, b in pairwise(ends)]
    assert found.length == 530
    assert found.parts == pytest.approx(expected, abs=1e-5)
    assert found.last_by_window == pytest.approx(each[:, 397:].mean(1).tolist(), abs=1e-5)
    assert found.mean == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_a_difference_has_the_error_of_its_pairs() -> None:
    tokens = torch.randint(7, (4, 300), generator=torch.Generator().manual_seed(1))
    one = losses(MODEL, tokens)
    gain, error = last_quarter(one, one)
    assert (gain, error) == (0, 0)
    other = losses(MODEL, tokens.flip(1))
    gain, error = last_quarter(one, other)
    pairs = np.subtract(one.last_by_window, other.last_by_window)
    assert gain == pytest.approx(pairs.mean()) and error == pytest.approx(pairs.std(ddof=1) / 2)
    assert np.isnan(last_quarter(losses(MODEL, tokens[:1]), losses(MODEL, tokens[1:2]))[1])
